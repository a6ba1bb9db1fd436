"""Running, editing and generating; tokens; the unembedding."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, processors
from torch import Tensor

from activation_cache import LanguageModel, ModelError

ARCHS = ["gpt2", "llama", "gpt_neox", "gemma", "gemma2", "qwen2", "opt", "falcon", "mixtral"]
TEXT = "The river crosses the bridge."


@pytest.fixture
def make_lm(tiny_model: Callable[[str], Any], tiny_tokenizer: Any) -> Callable[[str], Any]:
    return lambda arch: LanguageModel(tiny_model(arch), tiny_tokenizer, name=arch)


def _n_hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def _double(x: Tensor) -> Tensor:
    return 2 * x


def _fail(_: Tensor) -> Tensor:
    raise ZeroDivisionError


@pytest.mark.parametrize("arch", ARCHS)
def test_logits_are_bitwise_those_of_the_untouched_model(
    arch: str, tiny_model: Callable[[str], Any], make_lm: Callable[[str], Any]
) -> None:
    lm, untouched = make_lm(arch), tiny_model(arch)
    ids, _ = lm.token_batch(TEXT)
    with torch.no_grad():
        expected = untouched(input_ids=ids).logits
    places = [h for h in lm.hookpoints() if h.startswith("layers.1.")]

    assert torch.equal(lm.logits(TEXT), expected)
    with lm.edit({}):
        assert torch.equal(lm.logits(TEXT), expected)
    with lm.edit({place: lambda x: x for place in places}):
        assert torch.equal(lm.logits(TEXT), expected)
    with lm.edit({"layers.1.resid_post": _double}):
        assert not torch.equal(lm.logits(TEXT), expected)
    with pytest.raises(ZeroDivisionError), lm.edit({"layers.1.mlp_out": _fail}):
        lm.logits(TEXT)
    lm.capture(TEXT, places)
    assert _n_hooks(lm.model) == 0
    assert torch.equal(lm.logits(TEXT), expected)


@pytest.mark.parametrize("arch", ["gpt2", "llama", "gpt_neox", "gemma2", "opt", "bloom"])
def test_edit_replaces_the_stream(arch: str, make_lm: Callable[[str], Any]) -> None:
    """Adding v to what attention or MLP adds is adding it to the stream after them."""
    lm = make_lm(arch)
    v = torch.linspace(-1, 1, 32)
    v -= v.mean()
    shapes = []

    def add(x: Tensor) -> Tensor:
        shapes.append(tuple(x.shape))
        return x + v

    results = []
    for place in ("mlp_out", "resid_post"):
        with lm.edit({f"layers.1.{place}": add}):
            results.append(lm.capture([TEXT, TEXT], ["layers.1.resid_post"]).acts)
    n = lm.token_batch(TEXT)[0].shape[1]
    assert shapes == [(2, n, 32), (2, n, 32)]
    plain = lm.capture([TEXT, TEXT], ["layers.1.resid_post"]).acts["layers.1.resid_post"]
    for acts in results:
        torch.testing.assert_close(acts["layers.1.resid_post"], plain + v, rtol=1e-5, atol=1e-5)


def test_nested_edits_act_in_order(tiny_lm: LanguageModel) -> None:
    place = "layers.0.resid_post"
    plain = tiny_lm.capture(TEXT, [place]).acts[place]
    with tiny_lm.edit({place: lambda x: x + 1}), tiny_lm.edit({place: _double}):
        assert torch.equal(tiny_lm.capture(TEXT, [place]).acts[place], 2 * (plain + 1))


def test_capture_stops_after_the_last_hookpoint(make_lm: Callable[[str], Any]) -> None:
    lm = make_lm("llama")
    lm.hookpoints()  # probes run whole passes: let them be over
    n_calls = [0, 0, 0]
    for i, layer in enumerate(lm.model.model.layers):
        layer.register_forward_pre_hook(
            lambda *_, i=i: n_calls.__setitem__(i, n_calls[i] + 1)  # type: ignore[misc]
        )
    lm.capture(TEXT, ["layers.0.resid_post", "layers.1.resid_pre"])
    assert n_calls == [1, 1, 0]


def test_captured_tensors_keep_their_values_when_the_model_works_in_place(
    make_lm: Callable[[str], Any],
) -> None:
    lm = make_lm("falcon")  # it adds attention's output onto the MLP's output in place
    alone = lm.capture(TEXT, ["layers.1.mlp_out"]).acts["layers.1.mlp_out"]
    both = lm.capture(TEXT, ["layers.1.mlp_out", "layers.2.resid_post"]).acts
    assert torch.equal(alone, both["layers.1.mlp_out"])


@pytest.mark.parametrize("arch", ["gpt2", "llama", "gpt_neox", "gemma", "gemma3", "qwen3", "opt"])
def test_edits_act_in_generation_as_without_a_cache(
    arch: str, make_lm: Callable[[str], Any]
) -> None:
    lm = make_lm(arch)
    v = torch.randn(32, generator=torch.Generator().manual_seed(0)) * 3
    lm.model.generation_config.eos_token_id = None
    with lm.edit({"layers.1.resid_post": lambda x: x + v}):
        with_cache = lm.generate(TEXT, max_new_tokens=8)
        ids, _ = lm.token_batch(TEXT)
        for _ in range(8):
            ids = torch.cat([ids, lm.logits(ids)[:, -1:].argmax(-1)], dim=1)
    assert with_cache == lm.tokenizer.decode(ids[0])
    assert with_cache != lm.generate(TEXT, max_new_tokens=8)


def test_generation_is_plain_and_seeded(make_lm: Callable[[str], Any]) -> None:
    lm = make_lm("llama")
    greedy = lm.generate(TEXT, max_new_tokens=12)
    state = torch.random.get_rng_state()
    sampled = lm.generate(TEXT, max_new_tokens=12, temperature=1.5, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert sampled == lm.generate(TEXT, max_new_tokens=12, temperature=1.5, seed=3)
    assert sampled != lm.generate(TEXT, max_new_tokens=12, temperature=1.5, seed=4)
    lm.model.generation_config.update(
        repetition_penalty=5.0, do_sample=True, temperature=9.0, top_k=3, top_p=0.5
    )
    assert lm.generate(TEXT, max_new_tokens=12) == greedy
    assert lm.generate(TEXT, max_new_tokens=12, temperature=1.5, seed=3) == sampled
    with pytest.raises(ModelError, match=r"temperature=-1\.0: expected 0"):
        lm.generate(TEXT, temperature=-1.0)


@pytest.mark.parametrize("arch", ARCHS)
def test_right_padding_does_not_change_real_rows(arch: str, make_lm: Callable[[str], Any]) -> None:
    lm = make_lm(arch)
    texts = ["Paris", TEXT * 2, "A small bird"]
    place = "layers.2.resid_post"
    captured = lm.capture(texts, [place])
    for i, text in enumerate(texts):
        alone = lm.capture(text, [place])
        n = alone.token_ids.shape[1]
        assert captured.attention_mask[i].tolist() == [1] * n + [0] * (
            captured.token_ids.shape[1] - n
        )
        assert torch.equal(captured.token_ids[i, :n], alone.token_ids[0])
        torch.testing.assert_close(
            captured.acts[place][i, :n], alone.acts[place][0], rtol=1e-4, atol=1e-4
        )


def test_bos_is_told_from_the_tokenizer(tiny_tokenizer: Any, tiny_lm: LanguageModel) -> None:
    assert not tiny_lm.prepends_bos
    backend = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    with_bos = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    lm = LanguageModel(tiny_lm.model, with_bos, name="bos")
    assert lm.prepends_bos
    assert lm.token_batch("Paris")[0][0, 0] == 1
    assert lm.generate("Paris", max_new_tokens=2).startswith("Paris")


def test_token_strings_of_byte_level_pieces(tiny_lm: LanguageModel) -> None:
    text = "Paris 日🙂 naïve\n"
    ids = tiny_lm.token_batch(text)[0][0]
    strings = tiny_lm.token_strings(ids)
    assert len(strings) == len(ids)
    assert all("�" not in s for s in strings)
    as_bytes = re.sub(
        rb"<0x(..)>", lambda m: bytes.fromhex(m[1].decode()), "".join(strings).encode()
    )
    assert as_bytes.decode() == text
    assert tiny_lm.token_strings([1, 100_000]) == ["<bos>", "<unused 100000>"]


def test_token_strings_of_sentencepiece_like_pieces(tiny_lm: LanguageModel) -> None:
    vocab = {"<unk>": 0, "▁the": 1, "the": 2, "<0xE2>": 3, "▁": 4}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    lm = LanguageModel(tiny_lm.model, tokenizer, name="pieces")
    assert lm.token_strings([1, 2, 3, 4]) == [" the", "the", "<0xE2>", " "]


@pytest.mark.parametrize("arch", ["gpt2", "llama", "gpt_neox", "gemma", "gemma3", "qwen2", "opt"])
def test_logit_matrix_is_the_norm_and_the_head(arch: str, make_lm: Callable[[str], Any]) -> None:
    """On a vector of mean 0 and mean square 1 the norm only scales: norm and head are linear."""
    lm = make_lm(arch)
    v = torch.randn(32, generator=torch.Generator().manual_seed(1))
    v = (v - v.mean()) / (v - v.mean()).square().mean().sqrt()
    norm, head = lm.site("final_norm").module, lm.model.get_output_embeddings()
    bias = getattr(norm, "bias", None)
    with torch.no_grad():
        head_bias = head(torch.zeros(32))
        expected = head(norm(v[None, None]) - (0 if bias is None else bias))[0, 0] - head_bias
    assert lm.logit_matrix().dtype == torch.float32
    torch.testing.assert_close(v @ lm.logit_matrix(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("", "the text is empty: give at least one token"),
        ([], "the text is empty: give at least one token"),
        (["Paris", ""], "the text is empty: give at least one token"),
        (torch.zeros(0, dtype=torch.int64), "the text is empty: give at least one token"),
        (
            torch.tensor([[5, 4000]]),
            "token id 4000 is outside of the vocabulary of 400: these tokens come from another "
            "tokenizer",
        ),
        (
            torch.tensor([3, -1]),
            "token id -1 is outside of the vocabulary of 400: these tokens come from another "
            "tokenizer",
        ),
        (
            torch.ones(1, 129, dtype=torch.int64),
            "129 tokens are more than tiny-llama has positions for (128): shorten the text",
        ),
    ],
)
def test_inputs_that_can_not_be_run(tiny_lm: LanguageModel, inputs: Any, message: str) -> None:
    with pytest.raises(ModelError) as raised:
        tiny_lm.logits(inputs)
    assert str(raised.value) == message


def test_revision_changes_with_the_weights(make_lm: Callable[[str], Any]) -> None:
    lm, same, other = make_lm("llama"), make_lm("llama"), make_lm("llama")
    with torch.no_grad():
        other.model.model.norm.weight[3] += 1e-6
    assert lm.revision == same.revision
    assert lm.revision != other.revision


def test_a_causal_model_is_told_from_a_bidirectional_one(
    tiny_model: Callable[[str], Any], tiny_tokenizer: Any
) -> None:
    assert LanguageModel(tiny_model("gpt2"), tiny_tokenizer, name="gpt2").is_causal
    config = transformers.BertConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        is_decoder=False,
        initializer_range=0.5,
    )
    bert = transformers.BertLMHeadModel(config)
    assert not LanguageModel(bert, tiny_tokenizer, name="bert").is_causal
