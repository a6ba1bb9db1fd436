"""Standard hookpoints, on every architecture, against hooks placed by hand on the known modules."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from activation_cache import HookpointError, LanguageModel

TEXT = "Paris forgets three keys. 日本"


class Known(NamedTuple):
    """Module paths of one architecture, below layer i where they begin with a dot. `mid` is read
    at its input, as `mlp_in` and the two projections are; None where layers are parallel."""

    layers: str
    attn_out: str
    mlp_out: str
    mid: str | None
    attn_projection: str
    mlp_projection: str | None
    embed: str
    final_norm: str
    mlp_in: str = ".mlp"


def _llama_like(**changes: Any) -> Known:
    known = Known(
        layers="model.layers",
        attn_out=".self_attn",
        mlp_out=".mlp",
        mid=".post_attention_layernorm",
        attn_projection=".self_attn.o_proj",
        mlp_projection=".mlp.down_proj",
        embed="model.embed_tokens",
        final_norm="model.norm",
    )
    return known._replace(**changes)


_NEOX = Known(
    layers="gpt_neox.layers",
    attn_out=".attention",
    mlp_out=".mlp",
    mid=None,
    attn_projection=".attention.dense",
    mlp_projection=".mlp.dense_4h_to_h",
    embed="gpt_neox.embed_in",
    final_norm="gpt_neox.final_layer_norm",
)
_POST_NORMS = _llama_like(
    attn_out=".post_attention_layernorm",
    mlp_out=".post_feedforward_layernorm",
    mid=".pre_feedforward_layernorm",
)
_BLOOM = Known(
    layers="transformer.h",
    attn_out=".self_attention.dense",
    mlp_out=".mlp.dense_4h_to_h",
    mid=".post_attention_layernorm",
    attn_projection=".self_attention.dense",
    mlp_projection=".mlp.dense_4h_to_h",
    embed="transformer.word_embeddings",
    final_norm="transformer.ln_f",
)
KNOWN = {
    "gpt2": Known(
        layers="transformer.h",
        attn_out=".attn",
        mlp_out=".mlp",
        mid=".ln_2",
        attn_projection=".attn.c_proj",
        mlp_projection=".mlp.c_proj",
        embed="transformer.wte",
        final_norm="transformer.ln_f",
    ),
    "llama": _llama_like(),
    "gpt_neox": _NEOX,
    "gpt_neox_serial": _NEOX._replace(mid=".post_attention_layernorm"),
    "gemma": _llama_like(),
    "gemma2": _POST_NORMS,
    "gemma3": _POST_NORMS,
    "qwen2": _llama_like(),
    "qwen3": _llama_like(),
    "mistral": _llama_like(),
    "phi": _llama_like(
        mid=None,
        attn_projection=".self_attn.dense",
        mlp_projection=".mlp.fc2",
        final_norm="model.final_layernorm",
    ),
    "opt": Known(
        layers="model.decoder.layers",
        attn_out=".self_attn",
        mlp_out=".fc2",
        mid=".final_layer_norm",
        attn_projection=".self_attn.out_proj",
        mlp_projection=".fc2",
        embed="model.decoder.embed_tokens",
        final_norm="model.decoder.final_layer_norm",
        mlp_in=".fc1",
    ),
    "falcon": _BLOOM._replace(attn_out=".self_attention", mlp_out=".mlp", mid=None),
    "bloom": _BLOOM,
    "mixtral": _llama_like(mlp_projection=None),
    "qwen2_moe": _llama_like(mlp_projection=None),
}
every_architecture = pytest.mark.parametrize("arch", KNOWN)


def _by_hand(model: Any, ids: Tensor, path: str, *, on_input: bool) -> Tensor:
    """What flows through a module in a plain forward pass, [batch, seq, width]."""
    seen: list[Tensor] = []

    def hook(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        x = (args[0] if args else kwargs["hidden_states"]) if on_input else output
        seen.append((x[0] if isinstance(x, tuple) else x).clone())

    handle = model.get_submodule(path).register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    handle.remove()
    return seen[0].reshape(*ids.shape, -1)


def _expected_sites(known: Known, layer: int) -> dict[str, tuple[str, bool] | None]:
    """Hookpoint -> (module path, whether it is the input), None where there is none."""
    root, at = f"{known.layers}.{layer}", f"layers.{layer}"
    return {
        "embed": (known.embed, False),
        f"{at}.resid_pre": (root, True),
        f"{at}.attn_heads": (root + known.attn_projection, True),
        f"{at}.attn_out": (root + known.attn_out, False),
        f"{at}.resid_mid": (root + known.mid, True) if known.mid else None,
        f"{at}.mlp_in": (root + known.mlp_in, True),
        f"{at}.mlp_acts": (root + known.mlp_projection, True) if known.mlp_projection else None,
        f"{at}.mlp_out": (root + known.mlp_out, False),
        f"{at}.resid_post": (root, False),
        "final_norm": (known.final_norm, False),
    }


@pytest.fixture
def make_lm(tiny_model: Callable[[str], Any], tiny_tokenizer: Any) -> Callable[[str], Any]:
    return lambda arch: LanguageModel(tiny_model(arch), tiny_tokenizer, name=arch)


@every_architecture
def test_capture_equals_hooks_placed_by_hand(arch: str, make_lm: Callable[[str], Any]) -> None:
    lm = make_lm(arch)
    ids, _ = lm.token_batch(TEXT)
    ids = torch.cat([ids, ids.flip(1)])  # two rows: what a model flattens must come back in shape
    expected = {h: site for h, site in _expected_sites(KNOWN[arch], 1).items() if site}

    captured = lm.capture(ids, list(expected)).acts

    for hookpoint, (path, on_input) in expected.items():
        by_hand = _by_hand(lm.model, ids, path, on_input=on_input)
        assert torch.equal(captured[hookpoint], by_hand), hookpoint
        alone = lm.capture(ids, [hookpoint]).acts[hookpoint]
        assert torch.equal(alone, by_hand), hookpoint


@every_architecture
def test_stream_is_the_sum_of_its_parts(arch: str, make_lm: Callable[[str], Any]) -> None:
    lm = make_lm(arch)
    wanted = [h for h, site in _expected_sites(KNOWN[arch], 1).items() if site]
    acts = {h.split(".")[-1]: a for h, a in lm.capture(TEXT, wanted).acts.items()}

    mid = acts["resid_pre"] + acts["attn_out"]
    torch.testing.assert_close(mid + acts["mlp_out"], acts["resid_post"], rtol=1e-5, atol=1e-5)
    if KNOWN[arch].mid:
        torch.testing.assert_close(mid, acts["resid_mid"], rtol=1e-5, atol=1e-5)


@every_architecture
def test_mlp_in_alone_decides_mlp_out(arch: str, make_lm: Callable[[str], Any]) -> None:
    """What a transcoder needs; an edit of it reaches the output too."""
    lm = make_lm(arch)
    ids = torch.arange(24).view(2, 12) * 5 % lm.vocab_size
    mlp_in, mlp_out = "layers.1.mlp_in", "layers.1.mlp_out"
    first, second = (lm.capture(each, [mlp_in, mlp_out]).acts for each in (ids, ids.flip(1)))
    assert not torch.equal(first[mlp_out], second[mlp_out])

    with lm.edit({mlp_in: lambda _: first[mlp_in]}):
        held = lm.capture(ids.flip(1), [mlp_out]).acts[mlp_out]

    assert torch.equal(held, first[mlp_out])


@every_architecture
def test_hookpoints_lists_what_the_model_has(arch: str, make_lm: Callable[[str], Any]) -> None:
    lm = make_lm(arch)
    expected = _expected_sites(KNOWN[arch], 1)
    assert [h for h in lm.hookpoints() if "layers" not in h] == ["embed", "final_norm"]
    assert [h for h in lm.hookpoints() if h.startswith("layers.1.")] == [
        h for h, site in expected.items() if site and h.startswith("layers.1.")
    ]
    for hookpoint in (h for h, site in expected.items() if not site):
        with pytest.raises(HookpointError, match=f"this model has no {hookpoint}: .+") as raised:
            lm.site(hookpoint)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("arch", ["llama", "gpt_neox", "gpt_neox_serial", "gemma2"])
def test_small_additions_to_a_large_stream_do_not_mislead_in_bfloat16(
    arch: str, make_lm: Callable[[str], Any]
) -> None:
    """As in a trained model's late layers: what is added is below the stream's rounding error."""
    lm = make_lm(arch)
    known = KNOWN[arch]
    with torch.no_grad():
        lm.model.get_submodule(known.embed).weight *= 1000
        for projection in (known.attn_projection, known.mlp_projection):
            lm.model.get_submodule(f"{known.layers}.1{projection}").weight *= 1e-3
    lm = LanguageModel(lm.model.to(torch.bfloat16), lm.tokenizer, name=arch)
    modules = dict(lm.model.named_modules())
    for hookpoint, site in _expected_sites(known, 1).items():
        if site:
            assert lm.site(hookpoint) == (modules[site[0]], site[1]), hookpoint
        else:
            with pytest.raises(HookpointError):
                lm.site(hookpoint)


def test_module_paths_are_hookpoints(tiny_lm: LanguageModel) -> None:
    ids, _ = tiny_lm.token_batch(TEXT)
    path = "model.layers.2.mlp.gate_proj"
    acts = tiny_lm.capture(TEXT, [path, "model", "model.norm"]).acts
    assert torch.equal(acts[path], _by_hand(tiny_lm.model, ids, path, on_input=False))
    assert torch.equal(acts["model"], acts["model.norm"])  # the output object's hidden states


def test_probing_does_not_disturb_active_edits(make_lm: Callable[[str], Any]) -> None:
    lm = make_lm("llama")
    seen = []

    def needs_twelve_positions(x: Tensor) -> Tensor:
        seen.append(x.shape)
        return x + x[:, 11:12]

    with lm.edit({"layers.0.resid_post": needs_twelve_positions}):
        lm.site("layers.1.mlp_out")
        assert not seen
        lm.capture(torch.arange(12), ["layers.1.mlp_out"])
    assert seen == [(1, 12, 32)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layers.1.resid_pots", "did you mean 'layers.1.resid_post'? "),
        ("layer.1.mlp_out", "did you mean 'layers.1.mlp_out'? "),
        ("model.layers.0.mlp.gate_prj", "did you mean 'model.layers.0.mlp.gate_proj'? "),
        ("somewhere", ""),
        ("", ""),
    ],
)
def test_unknown_hookpoint_suggests_the_nearest(
    tiny_lm: LanguageModel, name: str, message: str
) -> None:
    with pytest.raises(HookpointError) as raised:
        tiny_lm.site(name)
    assert str(raised.value) == (
        f"unknown hookpoint {name!r}: {message}expected embed, final_norm, layers.0 to layers.2 "
        "with .resid_pre|attn_heads|attn_out|resid_mid|mlp_in|mlp_acts|mlp_out|resid_post, "
        "or the path of a module"
    )


def test_layer_out_of_range_names_the_layers(tiny_lm: LanguageModel) -> None:
    with pytest.raises(HookpointError) as raised:
        tiny_lm.site("layers.3.resid_post")
    assert str(raised.value) == (
        "unknown hookpoint 'layers.3.resid_post': the model has layers 0 to 2"
    )


def test_module_that_never_runs_is_an_error(tiny_lm: LanguageModel) -> None:
    with pytest.raises(HookpointError, match=r"the model never ran 'model\.layers'"):
        tiny_lm.capture(TEXT, ["model.layers"])


def test_width_refuses_what_is_not_one_row_for_each_token(make_lm: Callable[[str], Any]) -> None:
    lm = make_lm("qwen3")
    assert lm.width("layers.1.mlp_acts") == 64
    with pytest.raises(HookpointError) as raised:
        lm.width("model.layers.0.self_attn.q_norm")
    assert str(raised.value) == (
        "'model.layers.0.self_attn.q_norm' gives a tensor of shape [1, 2, 4, 8] for two tokens: "
        "expected [batch, seq, width], one row for each token; choose another place"
    )
