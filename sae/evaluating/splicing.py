"""Putting something else in the place of activations while a language model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from sae.config import Split
from sae.errors import SourceError
from sae.reading import batch_of
from sae.sources import EvaluationSource, SplicedModel, TokenBlock
from sae.wiring import Wiring

Replacement = Callable[[Tensor], Tensor]


class SplicedLoss(NamedTuple):
    """cross_entropy: nats a target token. kl: KL(clean || replaced), nats a target token."""

    cross_entropy: float
    kl: float


class SplicedLosses(NamedTuple):
    """clean: the untouched model's cross-entropy. replaced: by name. n_tokens: targets counted."""

    clean: float
    replaced: dict[str, SplicedLoss]
    n_tokens: int


@torch.no_grad()
def spliced_losses(
    lm: SplicedModel,
    source: EvaluationSource,
    wiring: Wiring,
    replacements: Mapping[str, Replacement],
    *,
    max_norm: float,
    n_tokens: int,
    batch_size: int,
    split: Split = "heldout",
) -> SplicedLosses:
    """Cross-entropies of a model with its activations where a wiring writes replaced in turn.

    A replacement maps what the untouched model has where the wiring reads, rows [n, d_in] float32,
    to [n, d_out]. Rows of a norm above max_norm stay as they are. The prediction made at a position
    counts if the next token is in the split; at least n_tokens are counted, or all there are.
    Raises: SourceError if the source has no token in the split.
    """
    sums = dict.fromkeys(replacements, (0.0, 0.0))
    clean_sum, n_counted = 0.0, 0
    for blocks in batched_blocks(source.token_blocks(split=split), batch_size):
        token_ids, is_counted = _stack(blocks)
        acts: dict[str, Tensor] = {}
        with lm.edit({each: _noted(acts, each) for each in wiring.hookpoints}):
            clean = _log_probabilities(lm, token_ids, is_counted)
        targets = token_ids[:, 1:][is_counted].to(clean.device)
        clean_sum += _cross_entropy_sum(clean, targets)
        probabilities = clean.exp()
        for name, replacement in replacements.items():
            with lm.edit(_edits(acts, wiring, replacement, max_norm)):
                replaced = _log_probabilities(lm, token_ids, is_counted)
            ce_sum, kl_sum = sums[name]
            divergence = float((probabilities * (clean - replaced)).sum(1).double().sum())
            sums[name] = (ce_sum + _cross_entropy_sum(replaced, targets), kl_sum + divergence)
        n_counted += len(targets)
        if n_counted >= n_tokens:
            break
    if n_counted == 0:
        raise SourceError(
            f"the source has no {split} tokens to run a model on; evaluate without lm, or give a "
            "cache that was harvested with held-out documents"
        )
    means = {name: SplicedLoss(ce / n_counted, kl / n_counted) for name, (ce, kl) in sums.items()}
    return SplicedLosses(clean_sum / n_counted, means, n_counted)


def _noted(acts: dict[str, Tensor], hookpoint: str) -> Callable[[Tensor], Tensor]:
    """An edit that changes nothing, and keeps what there is."""

    def note(x: Tensor) -> Tensor:
        acts[hookpoint] = x.clone()
        return x

    return note


def _edits(
    acts: dict[str, Tensor], wiring: Wiring, replacement: Replacement, max_norm: float
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Edits that put a replacement where the wiring writes, rows of massive norm left as they
    are."""
    rows = batch_of({each: x.flatten(0, -2).float() for each, x in acts.items()}, wiring)
    is_massive = rows.x.norm(dim=1, keepdim=True) > max_norm
    replaced = torch.where(is_massive, rows.y, replacement(rows.x).to(rows.y.device))
    widths = [acts[each].shape[-1] for each in wiring.writes]
    return {
        each: _put(part.to(acts[each].dtype).view(acts[each].shape))
        for each, part in zip(wiring.writes, replaced.split(widths, dim=1), strict=True)
    }


def _put(value: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: value.to(x.device)


def batched_blocks(blocks: Iterable[TokenBlock], batch_size: int) -> Iterator[list[TokenBlock]]:
    """Blocks of equal length together, batch_size at most.

    Those of another length than their neighbours make a batch of their own.
    """
    waiting: list[TokenBlock] = []
    for block in blocks:
        is_other_length = bool(waiting) and len(block.token_ids) != len(waiting[0].token_ids)
        if is_other_length or len(waiting) == batch_size:
            yield waiting
            waiting = []
        waiting.append(block)
    if waiting:
        yield waiting


def _stack(blocks: list[TokenBlock]) -> tuple[Tensor, Tensor]:
    """token_ids [batch, seq], and which targets count [batch, seq - 1]."""
    in_split = torch.stack([block.in_split for block in blocks])
    return torch.stack([block.token_ids for block in blocks]), in_split[:, 1:]


def _log_probabilities(lm: SplicedModel, token_ids: Tensor, is_counted: Tensor) -> Tensor:
    """Log-probabilities of the predictions that count: [n, vocab] float32."""
    logits = lm.logits(token_ids)[:, :-1]
    return logits[is_counted.to(logits.device)].float().log_softmax(-1)


def _cross_entropy_sum(log_probabilities: Tensor, targets: Tensor) -> float:
    chosen = log_probabilities.gather(1, targets.unsqueeze(1))
    return -float(chosen.double().sum())
