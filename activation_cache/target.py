"""Where in a cache a harvest goes: which of its texts it is, and in which folder."""

from typing import NamedTuple

from .documents import Corpus
from .errors import CacheMismatch
from .harvest_config import HarvestConfig
from .manifest import MANIFEST, Fingerprint, Manifest, read_records, record_names
from .parts import PARTS, Part, part_name, part_numbers, part_stores
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
            if other.is_same_text(fingerprint) and other.world_size != fingerprint.world_size:
                raise CacheMismatch(
                    f"{where} was begun with world_size={other.world_size}, now it is "
                    f"{fingerprint.world_size}: use the same, or harvest into another folder"
                )


def choose_target(
    root: Store, corpus: Corpus, config: HarvestConfig, *, extend: bool, rank: int, world_size: int
) -> Target:
    """The part that holds this text, or the place for it.

    extend: a text that is not there yet goes behind those that are.
    Raises: CacheMismatch if it can't be added yet, CacheCorrupt.
    """
    begun = [(store, Manifest.read(store)) for store in part_stores(root)]
    number = _number_of(root, begun, corpus)
    if number is None:
        numbers = part_numbers(root)
        number = numbers[-1] + 1 if extend and numbers else 0
    store = root.child(name) if (name := part_name(number, rank, world_size)) else root
    earlier = [each for each in begun if _text_number(root, each[0]) < number]
    if extend:
        _require_finished(earlier)
    is_newest = all(_text_number(root, each) <= number for each, _ in begun)
    has_shards = bool(record_names(store))  # without one there is nothing to fit to
    manifest = Manifest.read(store) if has_shards and store.has(MANIFEST) else None
    if not is_newest and manifest and config.n_tokens > manifest.n_tokens_wanted * world_size:
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


def _number_of(root: Store, begun: list[tuple[Store, Manifest]], corpus: Corpus) -> int | None:
    """Which text of a cache this is, if it is there."""
    for store, manifest in begun:
        made = manifest.fingerprint
        same = made.data == corpus.name and made.data_revision == corpus.revision
        if same and made.only == dict(corpus.only):
            return _text_number(root, store)
    return None


def _require_finished(earlier: list[tuple[Store, Manifest]]) -> None:
    for store, manifest in earlier:
        if not manifest.is_complete:
            raise CacheMismatch(
                f"{store.root} is not finished: run its harvest again to the end before "
                "another text is added"
            )
