"""Any Hugging Face causal language model, opened at its hookpoints.

In: a hub id, a folder, a `.gguf` file, "demo", or a model that is already in memory. Out: a
`LanguageModel` that captures the stream (`capture`), edits it (`edit`) and generates. Hooks live
only while they are needed: with nothing active, logits are bitwise those of the untouched model.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import HookpointError, ModelError
from .hookpoints import HookpointResolver
from .loading import LoadedModel, load_model, model_revision
from .sites import Edit, Site, hooked

_PLAIN_DECODING: dict[str, Any] = {
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "temperature": None,
    "top_k": None,
    "top_p": None,
    "min_p": None,
    "typical_p": None,
}


class Captured(NamedTuple):
    """What `LanguageModel.capture` returns.

    token_ids: int64 [batch, seq], padded on the right.
    attention_mask: int64 [batch, seq], 0 where padding stands.
    acts: hookpoint -> [batch, seq, width], in the model's dtype, on the model's device. Rows of
        padding hold whatever the model made of it: select with the mask.
    """

    token_ids: Tensor
    attention_mask: Tensor
    acts: dict[str, Tensor]


class _AllCaptured(Exception):
    """Raised by the last hook to leave the forward pass; never seen outside."""


class LanguageModel:
    """A causal language model and its tokenizer.

    model: any `transformers` causal model; it is put into eval mode and its weights are frozen.
    tokenizer: the tokenizer that belongs to it.
    name: what the user calls it; it is written into every artifact.
    revision: what exactly it is: the hub's commit, or a hash of the weights (made when left out).
    """

    def __init__(self, model: Any, tokenizer: Any, *, name: str, revision: str | None = None):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self._revision = revision
        self._hookpoints = HookpointResolver(self.model, self._run_probe)
        self._is_probing = False
        self._n_edits = 0
        self._turn = threading.RLock()  # hooks are the model's: one thread at a time
        self._seq_shape = torch.Size()  # [batch, seq] of the pass that runs

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> "LanguageModel":
        """Load a model by hub id, local folder, `.gguf` file, or "demo" (SmolLM2-135M-Instruct).

        name: with "#random-weights=0" behind it, the model's untrained twin: the same configuration
        and tokenizer, weights drawn anew with that seed. It keeps that name in every artifact.
        device: "auto" takes CUDA where there is one; else "cpu", "cuda:1", "mps".
        dtype: "float32", "bfloat16", "float16"; "auto" is bfloat16 on CUDA and float32 elsewhere.
        revision: a branch, tag or commit on the hub.
        Raises: ModelError in one line when the model can't be had.
        """
        loaded: LoadedModel = load_model(str(name), device, dtype, revision, trust_remote_code)
        return cls(loaded.model, loaded.tokenizer, name=str(name), revision=loaded.revision)

    @cached_property
    def revision(self) -> str:
        return self._revision or model_revision(self.model)

    @property
    def device(self) -> torch.device:
        return torch.device(next(self.model.parameters()).device)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype

    @property
    def n_layers(self) -> int:
        return len(self._hookpoints.layers)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: at least the number of tokens that the tokenizer knows."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @cached_property
    def is_causal(self) -> bool:
        """Whether what is predicted at a position depends on the tokens up to it alone.

        Measured: the last of a few tokens is exchanged, and earlier logits must stay.
        """
        ids = torch.arange(8)[None] % self.vocab_size
        other = ids.clone()
        other[0, -1] = self.vocab_size - 1
        before, after = (self.logits(each)[0, :-1].float() for each in (ids, other))
        return bool((before - after).abs().max() <= 1e-3 * before.abs().max())

    @property
    def max_ctx_len(self) -> int | None:
        """The longest sequence that the model has positions for, or None where it has no limit."""
        config = self.model.config.get_text_config()
        n = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        return int(n) if n else None

    def hookpoints(self) -> list[str]:
        """Every standard hookpoint of this model, in the order the data flows."""
        with self._turn:
            return self._hookpoints.names()

    def site(self, hookpoint: str) -> Site:
        """The module and side that `hookpoint` names. Raises: HookpointError."""
        with self._turn:
            return self._hookpoints.resolve(hookpoint)

    def width(self, hookpoint: str) -> int:
        """Size of the last axis at `hookpoint`, measured on two tokens.

        Raises: HookpointError if what flows there is not of shape [batch, seq, width].
        """
        ids = torch.zeros(1, 2, dtype=torch.int64)
        shape = tuple(self.capture(ids, [hookpoint]).acts[hookpoint].shape)
        if len(shape) != 3 or shape[:2] != (1, 2):
            raise HookpointError(
                f"{hookpoint!r} gives a tensor of shape {list(shape)} for two tokens: expected "
                "[batch, seq, width], one row for each token; choose another place"
            )
        return shape[-1]

    # -- running ---------------------------------------------------------------------------------

    def capture(self, inputs: str | Sequence[str] | Tensor, hookpoints: Sequence[str]) -> Captured:
        """One forward pass that keeps the activations at `hookpoints` and stops after the last.

        inputs: a text, several texts (padded on the right), or token ids [batch, seq].
        Raises: HookpointError if the model lacks a place, or never reaches one.
        """
        token_ids, mask = self.token_batch(inputs)
        sites = {name: self.site(name) for name in dict.fromkeys(hookpoints)}
        acts: dict[str, Tensor] = {}

        def keep(name: str) -> Edit:
            def hook(x: Tensor) -> Tensor:
                is_last = len(acts.keys() | {name}) == len(sites)
                # what lies before the last may be changed in place by the model (Falcon does)
                acts.setdefault(name, x if is_last else x.clone())
                if is_last:
                    raise _AllCaptured
                return x

            return hook

        hooks = [(site, keep(name)) for name, site in sites.items()]
        with self._turn, torch.no_grad(), self._hooked(hooks), suppress(_AllCaptured):
            self._forward(token_ids, mask)
        if missed := [name for name in sites if name not in acts]:
            raise HookpointError(
                f"the model never ran {missed[0]!r}: that module is not part of a forward pass"
            )
        return Captured(token_ids, mask, acts)

    @contextmanager
    def edit(self, edits: Mapping[str, Edit]) -> Iterator[None]:
        """While open, replaces the stream at each hookpoint by `fn(x)`.

        edits: hookpoint -> fn, with x and fn(x) of shape [batch, seq, width]. During generation
            with a KV cache seq is 1 after the prompt: fn sees every position once.
        The hooks are removed when the context closes, however it closes. Contexts nest; the inner
        one sees what the outer one made. Other threads wait with this model until it is closed.
        """
        with self._turn:
            hooks = [(self.site(name), fn) for name, fn in edits.items()]
            self._n_edits += len(hooks)
            try:
                with self._hooked(hooks):
                    yield
            finally:
                self._n_edits -= len(hooks)

    @property
    def is_edited(self) -> bool:
        """Whether an edit is active."""
        return self._n_edits > 0

    def logits(self, inputs: str | Sequence[str] | Tensor, *, grad: bool = False) -> Tensor:
        """Logits of a plain forward pass, [batch, seq, vocab], in the model's dtype.

        grad: whether gradients flow back from them, to what edits put in (the model is frozen).
        """
        token_ids, mask = self.token_batch(inputs)
        with self._turn, torch.set_grad_enabled(grad):
            return self._forward(token_ids, mask).logits  # type: ignore[no-any-return]

    @torch.no_grad()
    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 40,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> str:
        """The prompt and its continuation.

        temperature: 0 takes the most likely token each time (greedy); above 0 samples, and the
            same seed gives the same text. The model's own defaults (a penalty on repetition, a
            cut at the most likely tokens) are off.
        Raises: ModelError as `token_batch` does, or for a negative temperature.
        """
        if max_new_tokens < 1:
            raise ModelError(f"max_new_tokens={max_new_tokens}: expected 1 or more")
        if temperature < 0:
            raise ModelError(f"temperature={temperature}: expected 0 (greedy) or more")
        token_ids, mask = self.token_batch(prompt)
        sampling = _PLAIN_DECODING | {"do_sample": temperature > 0}
        if temperature > 0:
            sampling |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
        devices = [self.device] if self.device.type == "cuda" else []
        with self._turn, torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            out = self.model.generate(
                input_ids=token_ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                pad_token_id=self._pad_id(),
                **sampling,
            )
        n_special = 1 if self.prepends_bos else 0
        return str(self.tokenizer.decode(out[0, n_special:], skip_special_tokens=False))

    # -- tokens ----------------------------------------------------------------------------------

    @cached_property
    def prepends_bos(self) -> bool:
        """Whether the tokenizer itself puts its BOS token before every text."""
        ids = self.tokenizer("a").input_ids
        return bool(ids) and ids[0] == self.tokenizer.bos_token_id is not None

    def token_batch(self, inputs: str | Sequence[str] | Tensor) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, both int64 [batch, seq], on the model's device.

        Texts are tokenized as the tokenizer does by default (with BOS where it adds one) and
        padded on the right, where a causal model can't see it.
        Raises: ModelError for an empty text, ids outside the vocabulary, or more tokens than the
            model has positions for.
        """
        ids, mask = self._padded(inputs)
        if ids.numel() == 0:
            raise ModelError("the text is empty: give at least one token")
        bad = ids[(ids < 0) | (ids >= self.vocab_size)]
        if len(bad):
            raise ModelError(
                f"token id {int(bad[0])} is outside of the vocabulary of {self.vocab_size}: "
                "these tokens come from another tokenizer"
            )
        if self.max_ctx_len and ids.shape[1] > self.max_ctx_len:
            raise ModelError(
                f"{ids.shape[1]} tokens are more than {self.name} has positions for "
                f"({self.max_ctx_len}): shorten the text"
            )
        return ids.to(self.device), mask.to(self.device)

    def token_strings(self, token_ids: Sequence[int] | Tensor) -> list[str]:
        """Each token's own text; a token that is a part of a character is shown as `<0xE2>`."""
        ids = token_ids.tolist() if isinstance(token_ids, Tensor) else list(token_ids)
        return [self._token_string(int(i)) for i in ids]

    def logit_matrix(self) -> Tensor:
        """Unembedding with the final norm's scale folded in, float32 [width, vocab].

        `v @ logit_matrix()` is the direct effect of a direction v of the last residual stream on
        the logits, up to the norm's common positive factor (and its mean, for a LayerNorm).
        """
        head = self.model.get_output_embeddings()
        if head is None:
            raise ModelError(f"{type(self.model).__name__} has no unembedding")
        W_U: Tensor = head.weight.detach().float().T  # [width, vocab]
        scale = _norm_scale(self.site("final_norm").module)
        return W_U if scale is None else W_U * scale.to(W_U.device)[:, None]

    # -- inside ----------------------------------------------------------------------------------

    def _forward(self, token_ids: Tensor, mask: Tensor) -> Any:
        """One pass without a KV cache; the mask is left out where nothing is padded."""
        extra = {} if bool(mask.all()) else {"attention_mask": mask}
        return self.model(input_ids=token_ids, use_cache=False, **extra)

    def _run_probe(self, ids: Tensor) -> None:
        """A pass for the resolver: active edits let it through untouched and don't see it."""
        with self._turn:
            self._is_probing = True
            try:
                with torch.no_grad():
                    self._forward(ids.to(self.device), torch.ones_like(ids))
            finally:
                self._is_probing = False

    def _hooked(self, hooks: Sequence[tuple[Site, Edit]]) -> AbstractContextManager[None]:
        """Hooks whose functions always see [batch, seq, width]: OPT flattens the first two."""

        def note_shape(ids: Tensor) -> Tensor:
            self._seq_shape = ids.shape
            return ids

        def shaped(fn: Edit) -> Edit:
            def hook(x: Tensor) -> Tensor:
                if self._is_probing:
                    return x
                if x.dim() == 2 and len(x) == self._seq_shape.numel():
                    return fn(x.view(*self._seq_shape, -1)).reshape(x.shape)
                return fn(x)

            return hook

        embedding = Site(self.model.get_input_embeddings(), on_input=True)
        return hooked([(embedding, note_shape), *((site, shaped(fn)) for site, fn in hooks)])

    def _padded(self, inputs: str | Sequence[str] | Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(inputs, Tensor):
            ids = inputs.long()[None] if inputs.dim() == 1 else inputs.long()
            return ids, torch.ones_like(ids)
        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        rows = self.tokenizer(texts, verbose=False).input_ids if texts else []
        if not all(rows):
            return torch.empty(0, 0), torch.empty(0, 0)
        n = max(map(len, rows), default=0)
        ids = torch.tensor([row + [self._pad_id()] * (n - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (n - len(row)) for row in rows])
        return ids, mask

    def _pad_id(self) -> int:
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return int(next(i for i in known if i is not None))

    def _token_string(self, token_id: int) -> str:
        piece = self.tokenizer.convert_ids_to_tokens(token_id)
        text = str(self.tokenizer.decode([token_id], skip_special_tokens=False))
        if piece is None:
            return f"<unused {token_id}>"
        if "�" in text:
            return _bytes_shown(piece)
        if piece.startswith("▁") and not text.startswith(" "):
            return " " + text
        return text


def _norm_scale(norm: nn.Module) -> Tensor | None:
    """The factor by which a norm multiplies each coordinate, or None where it has no weight.

    Gemma's norms multiply by 1 + weight: told apart by a unit vector through the norm itself.
    """
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    ones = torch.ones(1, 1, weight.shape[0], dtype=weight.dtype, device=weight.device)
    ones[..., ::2] = -1.0  # mean 0 and mean square 1: any norm leaves it as it is
    bias = getattr(norm, "bias", None)
    out: Tensor = norm(ones) - (bias if isinstance(bias, Tensor) else 0)
    return (out / ones)[0, 0].detach().float()


def _bytes_shown(piece: str) -> str:
    """A byte-level token that is no whole character, byte by byte: `<0xE2><0x80>`."""
    if piece.startswith("<0x"):
        return piece
    values = [_BYTE_OF_CHAR.get(c, ord(c) & 255) for c in piece]
    return "".join(chr(b) if 32 <= b < 127 else f"<0x{b:02X}>" for b in values)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's table of printable stand-ins for bytes, which every byte-level BPE uses."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in plain}
    for n, b in enumerate(b for b in range(256) if b not in plain):
        table[chr(256 + n)] = b
    return table


_BYTE_OF_CHAR = _byte_alphabet()
