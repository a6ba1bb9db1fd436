"""Steer a model by features: edit the stream along their directions while it runs.

In: a `LanguageModel`, an `SAE` and a dose for each feature. Out: a context in which the model reads
an edited stream, and `compare`, which runs a prompt with and without it and measures what changed.

    x += (new - old) * W_dec[i]

Only the change of a feature is added, so the SAE's reconstruction error stays where it is. Doses
are in units of the feature's maximum activation, `sae.max_act`. Every position is edited, generated
ones included. Rows of massive norm (attention sinks) are left alone: the SAE was never trained on
them.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from activation_cache import LanguageModel
from sae import SAE

from .errors import SteeringError


@dataclass(frozen=True)
class Add:
    """Raise the feature by `strength` maxima at every position; negative lowers it."""

    strength: float


@dataclass(frozen=True)
class Clamp:
    """Hold the feature at `strength` maxima, whatever it would have been. 10 is the dose of
    Anthropic's Golden Gate Claude (Templeton et al. 2024)."""

    strength: float


@dataclass(frozen=True)
class Ablate:
    """Hold the feature at zero."""


Operation = Add | Clamp | Ablate


class SteeringOutcome(NamedTuple):
    """One prompt, unsteered and steered.

    baseline, steered: prompt and continuation. baseline_perplexity, steered_perplexity: of the
    continuation alone, under the unsteered model: how natural the text is. kl: mean over positions
    of the steered text of KL(unsteered || steered) of the next token, in nats.
    """

    prompt: str
    baseline: str
    steered: str
    baseline_perplexity: float
    steered_perplexity: float
    kl: float


@contextmanager
def steer(
    lm: LanguageModel,
    sae: SAE,
    operations: Mapping[int, Operation],
    *,
    hookpoint: str | None = None,
) -> Iterator[None]:
    """While open, `lm` runs with the features of `operations` edited.

    operations: feature_id -> Add, Clamp or Ablate. hookpoint: where; the SAE's own by default.
    With no operations, or with Add(0.0) alone, the model's output is bitwise the same.
    Raises: SteeringError for an unknown feature, a dose that is not finite, a feature without a
        unit (it was never active), or an SAE that was trained on another model or width.
    """
    if sae.wiring is not None and (not sae.is_tied or not sae.has_one_output):
        raise SteeringError(
            "steering edits the one place that an SAE reads and reconstructs; this one is wired "
            f"{sae.wiring.name}: pass an SAE of one place"
        )
    place = hookpoint or sae.hookpoint
    if place is None:
        raise SteeringError("the SAE names no hookpoint: pass hookpoint='layers.6.resid_post'")
    _require_fit(lm, sae, place)
    with lm.edit({place: stream_edit(sae, operations)}):
        yield


def stream_edit(sae: SAE, operations: Mapping[int, Operation]) -> Callable[[Tensor], Tensor]:
    """The edit itself: x [..., d_model] -> the edited stream, same dtype and device.

    Raises: SteeringError as `steer`.
    """
    for feature_id, operation in operations.items():
        _require_dose(sae, feature_id, operation)
    added = {i: op for i, op in operations.items() if isinstance(op, Add)}
    held = {i: op for i, op in operations.items() if not isinstance(op, Add)}
    offset = torch.zeros(sae.d_model)
    for i, operation in added.items():
        offset += operation.strength * sae.max_act[i].cpu() * sae.W_dec[i].cpu()  # [d_model]

    def edit(x: Tensor) -> Tensor:
        if not offset.any() and not held:
            return x
        change = offset.to(x.device).expand(x.shape)
        if held:
            change = change + _change_of_held(sae, held, x)
        edited = (x.float() + change).to(x.dtype)
        return torch.where(sae.in_domain(x)[..., None], edited, x)

    return edit


def compare(
    lm: LanguageModel,
    sae: SAE,
    operations: Mapping[int, Operation],
    prompt: str,
    *,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
    hookpoint: str | None = None,
    baseline: str | None = None,
) -> SteeringOutcome:
    """Continue `prompt` without and with steering, and measure what changed.

    baseline: the unsteered text, if it is known from an earlier call with the same prompt.
    """
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    baseline = baseline or lm.generate(prompt, **sampling)  # type: ignore[arg-type]
    with steer(lm, sae, operations, hookpoint=hookpoint):
        steered = lm.generate(prompt, **sampling)  # type: ignore[arg-type]
        logits = lm.logits(steered)
    return SteeringOutcome(
        prompt,
        baseline,
        steered,
        perplexity(lm, prompt, baseline),
        perplexity(lm, prompt, steered),
        _mean_kl(lm.logits(steered), logits),
    )


def perplexity(lm: LanguageModel, prompt: str, text: str) -> float:
    """Perplexity under `lm` of what `text` adds to `prompt`; nan if it adds no token.

    exp of the mean cross-entropy, in nats, of the tokens of `text` after those of `prompt`.
    """
    ids, _ = lm.token_batch(text)
    n_prompt = lm.token_batch(prompt)[0].shape[1]
    log_probs = lm.logits(ids)[0, :-1].float().log_softmax(-1)  # [seq - 1, vocab]
    of_next = log_probs.gather(-1, ids[0, 1:, None])[n_prompt - 1 :, 0]
    return math.exp(-float(of_next.mean())) if len(of_next) else math.nan


def _change_of_held(sae: SAE, held: Mapping[int, Operation], x: Tensor) -> Tensor:
    """(new - old) * W_dec over the features that are held at a value: [..., d_model] float32."""
    ids = torch.tensor(list(held), device=x.device)
    doses = [op.strength if isinstance(op, Clamp) else 0.0 for op in held.values()]
    new = torch.tensor(doses, device=x.device) * sae.max_act[ids]
    old = sae.encode(x)[..., ids]
    return (new - old) @ sae.W_dec[ids]


def _mean_kl(logits_p: Tensor, logits_q: Tensor) -> float:
    """Mean over positions of KL(p || q), in nats. logits: [1, seq, vocab]."""
    p, q = logits_p.float().log_softmax(-1), logits_q.float().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def _require_dose(sae: SAE, feature_id: int, operation: Operation) -> None:
    if not isinstance(operation, Operation):
        raise SteeringError(
            f"feature {feature_id}: expected Add, Clamp or Ablate, got {operation!r}"
        )
    if not isinstance(feature_id, int) or not 0 <= feature_id < sae.d_sae:
        raise SteeringError(
            f"unknown feature {feature_id!r}: this SAE has features 0 to {sae.d_sae - 1}"
        )
    if isinstance(operation, Ablate):
        return
    if not math.isfinite(operation.strength):
        raise SteeringError(f"strength {operation.strength} of feature {feature_id} is not finite")
    if operation.strength and float(sae.max_act[feature_id]) == 0:
        raise SteeringError(
            f"feature {feature_id} was never active when the SAE was calibrated, so it has no "
            "maximum to measure the strength by: choose a feature that is not dead"
        )


def _require_fit(lm: LanguageModel, sae: SAE, hookpoint: str) -> None:
    width = lm.width(hookpoint)
    if width != sae.d_model:
        raise SteeringError(
            f"{hookpoint} of {lm.name} is {width} wide, this SAE expects {sae.d_model}: "
            "use the model that it was trained on"
        )
    revision = sae.origin.provenance.get("model_revision")
    if revision and revision != lm.revision:
        raise SteeringError(
            f"this SAE was trained on {sae.origin.provenance.get('model')} ({revision}), not on "
            f"{lm.name} ({lm.revision}): load that model"
        )
