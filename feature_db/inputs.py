"""What an index is made from, checked to fit together before anything is written."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import xxhash

from sae import SAE, Report

from .config import IndexConfig
from .errors import IndexingError
from .schema import SCHEMA_VERSION

if TYPE_CHECKING:
    from activation_cache import ActivationCache, LanguageModel

REPORT_FILE = "report.json"
# Raised when the same inputs would give another database of the same schema.
INDEX_VERSION = 1


class IndexedSAE(NamedTuple):
    """One SAE to index. sae_id: its number in the database. report: its evaluation, if any."""

    sae_id: int
    name: str
    sae: SAE
    hookpoint: str
    weights_hash: str
    report: Report | None


def resolve_saes(saes: Sequence[SAE | str | Path], cache: "ActivationCache") -> list[IndexedSAE]:
    """Load what is given as a folder; name, hash and number all.

    An SAE in memory is named by its hookpoint and size; one given as a folder by the folder, and
    its report.json gives fvu, l0 and ce_recovered.
    Raises: IndexingError for none, one twice, or one that the cache can't serve.
    """
    if not saes:
        raise IndexingError("no SAE given: pass at least one, build_index(lm, [sae], cache, ...)")
    resolved = [_resolve(sae_id, each, cache) for sae_id, each in enumerate(saes)]
    hashes = [each.weights_hash for each in resolved]
    for each in resolved:
        if hashes.count(each.weights_hash) > 1:
            raise IndexingError(f"SAE {each.name!r} is given twice: pass each SAE once")
    return resolved


def check_fit(lm: "LanguageModel", saes: Sequence[IndexedSAE], cache: "ActivationCache") -> None:
    """Raises: IndexingError if the model, the SAEs and the cache don't belong together."""
    for each in saes:
        provenance = cache.provenance(each.hookpoint)
        _same_model(f"the model is {lm.name}", lm.revision, provenance)
        width = cache.d_model(each.hookpoint)
        if width != each.sae.d_model:
            raise IndexingError(
                f"the cache holds d_model={width} at {each.hookpoint}; SAE {each.name!r} expects "
                f"{each.sae.d_model}: pass the cache that it was trained on, or harvest again"
            )
        trained = each.sae.origin.provenance
        if "model_revision" in trained:
            made_from = f"SAE {each.name!r} was trained on {trained.get('model')}"
            _same_model(made_from, trained["model_revision"], provenance)


def identity_hash(
    lm: "LanguageModel",
    saes: Sequence[IndexedSAE],
    cache: "ActivationCache",
    config: IndexConfig,
) -> str:
    """A hash of everything that the database will hold the result of."""
    parts = {
        "schema": SCHEMA_VERSION,
        "index": INDEX_VERSION,
        "model": [lm.name, lm.revision],
        "cache": [cache.fingerprint_hash, cache.n_tokens],
        "max_norms": {each.hookpoint: cache.max_norm(each.hookpoint) for each in saes},
        "saes": [
            [each.name, each.hookpoint, each.weights_hash, each.report and each.report.model_dump()]
            for each in saes
        ],
        "config": config.identity(),
    }
    return xxhash.xxh3_128(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def weights_hash(sae: SAE) -> str:
    """A hash of what an SAE computes: its configuration and its weights' exact bytes."""
    digest = xxhash.xxh3_128(sae.config.model_dump_json().encode())
    for tensor in (sae.W_enc_rows, sae.W_dec, sae.b_enc, sae.b_dec, sae.threshold):
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _resolve(sae_id: int, given: SAE | str | Path, cache: "ActivationCache") -> IndexedSAE:
    report, name = None, None
    if isinstance(given, SAE):
        sae = given
    else:
        sae, name, report = SAE.load(given), Path(given).name, _report(Path(given))
    if sae.wiring is not None and (len(sae.wiring.reads) > 1 or sae.d_out != sae.d_model):
        raise IndexingError(
            f"an index reads one place and follows features into the logits; this SAE is wired "
            f"{sae.wiring.name}, {sae.d_model} wide to {sae.d_out}: pass an SAE of one place, or a "
            "transcoder between places of equal width"
        )
    hookpoint = sae.hookpoint or _only_hookpoint(cache)
    if hookpoint not in cache.hookpoints:
        raise IndexingError(
            f"the SAE expects {hookpoint}; the cache holds {', '.join(cache.hookpoints)}: "
            f"harvest with hookpoints=[{hookpoint!r}], or pass the matching SAE"
        )
    name = name or f"{hookpoint}-{sae.d_sae}"
    return IndexedSAE(sae_id, name, sae, hookpoint, weights_hash(sae), report)


def _only_hookpoint(cache: "ActivationCache") -> str:
    if len(cache.hookpoints) == 1:
        return str(cache.hookpoints[0])
    raise IndexingError(
        f"the SAE doesn't say its hookpoint and the cache holds {', '.join(cache.hookpoints)}: "
        "give the SAE an Origin(hookpoint=...)"
    )


def _report(folder: Path) -> Report | None:
    """The evaluation that lies beside the SAE; None where there is none."""
    path = folder / REPORT_FILE
    if not path.is_file():
        return None
    try:
        return Report.read(path)
    except ValueError:
        raise IndexingError(
            f"{path} is no evaluation report: remove it, or evaluate the SAE again"
        ) from None


def _same_model(what: str, revision: str | None, provenance: Mapping[str, Any]) -> None:
    if revision != provenance["model_revision"]:
        raise IndexingError(
            f"{what} (revision {str(revision)[:12]}); the cache was made with "
            f"{provenance['model']} (revision {str(provenance['model_revision'])[:12]}): "
            "pass what belongs to the cache, or harvest again"
        )
