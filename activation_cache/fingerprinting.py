"""What activations depend on: a model, a tokenizer, a text and settings -> a `Fingerprint`."""

import json
from collections.abc import Sequence
from typing import Any

import xxhash

from .documents import Corpus
from .errors import CacheError, CacheMismatch, ModelError
from .formats import TOKEN_BYTES, row_bytes
from .harvest_config import HarvestConfig
from .language_model import LanguageModel
from .manifest import TEXT_FIELDS, Fingerprint


def fingerprint_of(
    lm: LanguageModel,
    corpus: Corpus,
    hookpoints: Sequence[str],
    config: HarvestConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> Fingerprint:
    """What the activations depend on. Raises: ActivationCacheError for what can't be."""
    if lm.is_edited:
        raise CacheError(
            f"{lm.name} is being edited: a cache holds what the plain model makes, so close the "
            "edit first"
        )
    if not lm.is_causal:
        raise ModelError(
            f"{lm.name} is no causal language model: its predictions depend on later tokens"
        )
    longest = lm.max_ctx_len
    if longest and config.ctx_len > longest:
        raise CacheError(f"ctx_len={config.ctx_len} is longer than {lm.name} allows ({longest})")
    return Fingerprint(
        model=lm.name,
        model_revision=lm.revision,
        model_dtype=str(lm.dtype).removeprefix("torch."),
        tokenizer=tokenizer_hash(lm.tokenizer),
        hookpoints={name: lm.width(name) for name in hookpoints},
        bos_id=_bos_id(lm, config.prepend_bos),
        separator_id=lm.tokenizer.eos_token_id if config.separate_documents else None,
        rank=rank,
        world_size=world_size,
        **_known_without_model(corpus, config),
    )


def require_same_text(made: Fingerprint, corpus: Corpus, config: HarvestConfig, where: str) -> None:
    """What can be told before a model is loaded. Raises: CacheMismatch that names the field."""
    made.require_equal(made.model_copy(update=_known_without_model(corpus, config)), where)


def require_same_settings(
    made: Fingerprint, corpus: Corpus, config: HarvestConfig, where: str
) -> None:
    """Like `require_same_text`, of a part that may hold other documents."""
    known = _known_without_model(corpus, config)
    settings = {field: value for field, value in known.items() if field not in TEXT_FIELDS}
    made.require_equal(made.model_copy(update=settings), where)


def require_same_places(made: Fingerprint, hookpoints: Sequence[str], where: str) -> None:
    """Raises: CacheMismatch if a cache holds other hookpoints."""
    if sorted(made.hookpoints) != sorted(hookpoints):
        raise CacheMismatch(
            f"{where} was made with hookpoints={', '.join(made.hookpoints)}, now it is "
            f"{', '.join(hookpoints)}: use the same, or harvest into another folder"
        )


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of a tokenizer: its vocabulary, and how it cuts a text that has everything in it."""
    sample = "Hello  world! \n\t’naïve’ 12345 日本 🙂 <s>"
    content = [sorted(tokenizer.get_vocab().items()), tokenizer(sample).input_ids]
    return "xxh3:" + xxhash.xxh3_128(json.dumps(content).encode()).hexdigest()


def bytes_per_token(fingerprint: Fingerprint) -> int:
    """Disk that one row of the cache takes, all hookpoints and the token's record together."""
    widths = fingerprint.hookpoints.values()
    return TOKEN_BYTES + sum(row_bytes(w, fingerprint.storage_dtype) for w in widths)


def _known_without_model(corpus: Corpus, config: HarvestConfig) -> dict[str, Any]:
    return {
        "data": corpus.name,
        "data_revision": corpus.revision,
        "text_column": config.text_column,
        "only": dict(corpus.only),
        "drop_duplicates": corpus.drop_duplicates,
        "min_doc_tokens": config.min_doc_tokens,
        "max_doc_tokens": config.max_doc_tokens,
        "ctx_len": config.ctx_len,
        "keep_first_position": config.keep_first_position,
        "storage_dtype": config.storage_dtype,
        "batch_blocks": config.batch_blocks,
    }


def _bos_id(lm: LanguageModel, wanted: bool | None) -> int | None:
    if not (lm.prepends_bos if wanted is None else wanted):
        return None
    if lm.tokenizer.bos_token_id is None:
        raise CacheError(f"prepend_bos=true, but the tokenizer of {lm.name} has no BOS token")
    return int(lm.tokenizer.bos_token_id)
