"""Where in a cache a harvest goes: which of its texts it is, and in which folder."""

from typing import NamedTuple

from .documents import Corpus
from .errors import CacheMismatch
from .fingerprinting import require_same_text
from .harvest_config import HarvestConfig
from .manifest import Fingerprint, Manifest, read_records, record_names
from .parts import PARTS, Part, is_complete, part_name, part_stores
from .store import Store


class Target(NamedTuple):
    """store: folder of the part. manifest: its own, if it was begun. siblings: fingerprints of the
    other parts. first_document: number of the text's first document."""

    store: Store
    manifest: Manifest | None
    siblings: list[tuple[str, Fingerprint]]
    first_document: int

    def require_joinable(self, fingerprint: Fingerprint) -> None:
        """Raises: CacheMismatch if the rows can't lie in one cache with those that are there."""
        for where, other in self.siblings:
            other.require_joinable(fingerprint, where)


def choose_target(
    root: Store, corpus: Corpus, config: HarvestConfig, *, extend: bool, rank: int, world_size: int
) -> Target:
    """The part that holds this text, or the place for it.

    extend: a text that is not there yet goes behind those that are.
    Raises: CacheMismatch if it can't be added yet, CacheCorrupt.
    """
    begun = [(store, Manifest.read(store)) for store in part_stores(root)]
    number = _number_of(root, begun, corpus, config)
    if number is None:
        last = max((_text_number(root, each) for each, _ in begun), default=-1)
        number = last + 1 if extend else 0
    elif extend:
        _require_told_apart(root, begun, number, corpus)
    store = root.child(name) if (name := part_name(number, rank, world_size)) else root
    for each, made in begun:
        if _text_number(root, each) == number and each.root != store.root:
            _require_same_ranks(made.fingerprint, each.root, world_size)
            require_same_text(made.fingerprint, corpus, config, each.root)
    earlier = [each for each in begun if _text_number(root, each[0]) < number]
    if extend:
        _require_finished(root, earlier)
    is_newest = all(_text_number(root, each) <= number for each, _ in begun)
    has_shards = bool(record_names(store))  # without one there is nothing to fit to
    own = next((made for each, made in begun if each.root == store.root), None)
    manifest = own if has_shards else None
    n_tokens = manifest.n_tokens_wanted * world_size if manifest else config.n_tokens
    is_longer = config.n_tokens > n_tokens and not (manifest and manifest.is_exhausted)
    if is_longer and not is_newest:
        raise CacheMismatch(
            f"{store.root}: another text was added behind this one, so it can't go on to "
            f"n_tokens={config.n_tokens}; add documents as a text of their own with --extend"
        )
    return Target(
        store,
        manifest,
        [(each.root, made.fingerprint) for each, made in begun if each.root != store.root],
        max((_next_document(*each) for each in earlier), default=0),
    )


def _next_document(store: Store, manifest: Manifest) -> int:
    return Part(store, manifest, read_records(store, manifest)).next_document


def _text_number(root: Store, part: Store) -> int:
    inside = part.root.removeprefix(root.root).strip("/").removeprefix(f"{PARTS}/")
    return int(inside[:4] or 0)


def _number_of(
    root: Store, begun: list[tuple[Store, Manifest]], corpus: Corpus, config: HarvestConfig
) -> int | None:
    """Which text of a cache this is, if it is there."""
    for store, manifest in begun:
        made = manifest.fingerprint
        same = made.data == corpus.name and made.data_revision == corpus.revision
        same_rows = (made.text_column, made.only) == (config.text_column, dict(corpus.only))
        if same and same_rows:
            return _text_number(root, store)
    return None


def _require_told_apart(
    root: Store, begun: list[tuple[Store, Manifest]], number: int, corpus: Corpus
) -> None:
    there = [made for store, made in begun if _text_number(root, store) == number]
    if corpus.revision == "unknown" and all(made.is_complete for made in there):
        raise CacheMismatch(
            f"{root.root} holds a {corpus.name}, and nothing tells whether this one is another: "
            "give it as a list or a file, or leave out --extend to go on with the one that is there"
        )


def _require_same_ranks(made: Fingerprint, where: str, world_size: int) -> None:
    if made.world_size != world_size:
        raise CacheMismatch(
            f"{where} was begun with world_size={made.world_size}, now it is {world_size}: "
            "use the same, or harvest into another folder"
        )


def _require_finished(root: Store, earlier: list[tuple[Store, Manifest]]) -> None:
    for store, manifest in earlier:
        if not manifest.is_complete:
            raise CacheMismatch(
                f"{store.root} is not finished: run its harvest again to the end before "
                "another text is added"
            )
    if not is_complete([Part(store, manifest, []) for store, manifest in earlier]):
        raise CacheMismatch(
            f"{root.root} lacks ranks of its text: run all of them to the end before another text "
            "is added"
        )
