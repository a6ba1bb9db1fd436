"""Saving and loading: bitwise, and every way a folder can be wrong has its own one-line error."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae import (
    SAE,
    BatchTopKConfig,
    CorruptFileError,
    FormatError,
    MissingFileError,
    NewerFormatError,
    Origin,
    SAEConfig,
    SAEError,
    SourceError,
    StorageError,
    TopKConfig,
)
from sae.atomic_files import sha256


def random_sae(config: SAEConfig | None = None) -> SAE:
    torch.manual_seed(0)
    origin = Origin(
        hookpoint="layers.3.resid_post",
        max_norm=123.0,
        n_tokens_trained=10,
        provenance={"model": "tiny", "hashes": ["a", "b"]},
    )
    sae = SAE(config or BatchTopKConfig(d_sae=20, k=3), 8, origin)
    for tensor in sae.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape) - 0.3)
    sae.threshold.fill_(0.2)
    return sae


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return random_sae().save(tmp_path / "run")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("config", [TopKConfig(d_sae=20, k=3), BatchTopKConfig(d_sae=20, k=3)])
def test_save_and_load_is_bitwise(config: SAEConfig, tmp_path: Path) -> None:
    sae = random_sae(config)
    loaded = SAE.load(sae.save(tmp_path))
    expected, found = sae.state_dict(), loaded.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert loaded.config == sae.config
    assert loaded.origin == sae.origin
    x = torch.randn(50, 8)
    assert torch.equal(loaded.encode(x), sae.encode(x))
    before = (tmp_path / "config.json").read_bytes(), sha256(tmp_path / "sae.safetensors")
    loaded.save(tmp_path)
    assert before == ((tmp_path / "config.json").read_bytes(), sha256(tmp_path / "sae.safetensors"))


def test_shapes_on_disk_are_the_fields_own(folder: Path) -> None:
    tensors = load_file(folder / "sae.safetensors")
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
        "W_enc": [8, 20],
        "b_enc": [20],
        "W_dec": [20, 8],
        "b_dec": [8],
        "threshold": [],
        "max_act": [20],
        "density": [20],
    }
    assert torch.equal(tensors["W_enc"], SAE.load(folder).W_enc)


def test_an_sae_without_norm_limit_is_saved_as_plain_json(tmp_path: Path) -> None:
    SAE(TopKConfig(d_sae=4, k=1), 2).save(tmp_path)
    assert "Infinity" not in (tmp_path / "config.json").read_text()
    assert SAE.load(tmp_path).max_norm == math.inf


def test_encode_and_decode_agree_with_the_equations() -> None:
    sae = random_sae()
    x = torch.randn(4, 6, 8)
    pre_acts = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    expected = pre_acts * (pre_acts > sae.threshold)
    torch.testing.assert_close(sae.encode(x), expected)
    torch.testing.assert_close(sae(x), expected @ sae.W_dec + sae.b_dec)
    torch.testing.assert_close(sae.decode(sae.encode(x)), sae(x))
    codes = sae.encode_sparse(x)
    torch.testing.assert_close(sae.decode_sparse(codes).view(4, 6, 8), sae(x))
    assert sae.encode(x.bfloat16()).dtype == torch.float32


def test_encode_and_forward_are_differentiable_where_asked() -> None:
    sae = random_sae()
    x = torch.randn(5, 8)
    assert not sae(x).requires_grad
    leaf = x.clone().requires_grad_()
    sae(leaf).square().sum().backward()
    other = x.clone().requires_grad_()
    acts = ((other - sae.b_dec) @ sae.W_enc + sae.b_enc) * (sae.encode(x) > 0)
    (acts @ sae.W_dec + sae.b_dec).square().sum().backward()
    assert leaf.grad is not None
    assert other.grad is not None
    torch.testing.assert_close(leaf.grad, other.grad)
    sae.requires_grad_()
    sae(x).sum().backward()
    assert sae.W_enc_rows.grad is not None


def test_activations_of_another_width_are_an_error() -> None:
    with pytest.raises(SourceError, match=r"x is 7 wide; this SAE expects d_model=8 \(layers\.3"):
        random_sae().encode(torch.randn(2, 7))


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def remove_weights(folder: Path) -> None:
    (folder / "sae.safetensors").unlink()


def spoil_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"format_version": 1, "sae": {')


def flip_a_bit(folder: Path) -> None:
    path = folder / "sae.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def cut_weights(folder: Path) -> None:
    path = folder / "sae.safetensors"
    path.write_bytes(path.read_bytes()[:700])


def garble_weights(folder: Path) -> None:
    path = folder / "sae.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)


def rename_tensor(folder: Path) -> None:
    tensors = load_file(folder / "sae.safetensors")
    tensors["W_d"] = tensors.pop("W_dec")
    save_file(tensors, folder / "sae.safetensors")


def halve_precision(folder: Path) -> None:
    tensors = load_file(folder / "sae.safetensors")
    tensors["extra"] = torch.zeros(1000)
    tensors["W_dec"] = tensors["W_dec"].bfloat16()
    save_file(tensors, folder / "sae.safetensors")


def change(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        edit_config(folder, **changes)

    return damage


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (remove_config, MissingFileError, r"holds no config\.json; an SAE is a folder with"),
        (remove_weights, MissingFileError, r"holds no sae\.safetensors; copy the folder again"),
        (spoil_config, CorruptFileError, r"config\.json is no SAE's description"),
        (change(format_version=2), NewerFormatError, r"format_version 2; .* reads up to 1\. Up"),
        (change(format_version="x"), CorruptFileError, "is no SAE's description"),
        (change(architecture="gates"), CorruptFileError, "unknown architecture 'gates'; this ver"),
        (change(architecture="gated"), CorruptFileError, "GatedConfig has no setting 'k'; known"),
        (change(d_model=9), CorruptFileError, r"W_enc is \[8, 20, 'F32'\]; expected \[9, 20, 'F3"),
        (change(sae={"d_sae": 20}), CorruptFileError, "BatchTopKConfig.k: Field required"),
        (change(sae={"d_sae": 20, "k": 3, "kk": 1}), CorruptFileError, "no setting 'kk'; did you"),
        (change(sae={"d_sae": 10**15, "k": 3}), CorruptFileError, "need more than .* cut short"),
        (change(provenance=3), CorruptFileError, "Origin.provenance: "),
        (flip_a_bit, CorruptFileError, "the file is damaged or of another SAE"),
        (cut_weights, CorruptFileError, "700 bytes; d_sae=20 and d_model=8 need more than"),
        (garble_weights, CorruptFileError, "is no safetensors file"),
        (rename_tensor, CorruptFileError, "W_dec is missing; expected"),
        (halve_precision, CorruptFileError, r"W_dec is \[20, 8, 'BF16'\]; expected"),
    ],
)
def test_wrong_folders_are_refused_in_one_line(
    folder: Path, damage: Callable[[Path], None], error: type[SAEError], message: str
) -> None:
    damage(folder)
    with pytest.raises(error, match=message) as caught:
        SAE.load(folder)
    assert isinstance(caught.value, FormatError)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_folder_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="nowhere doesn't exist; an SAE is a folder"):
        SAE.load(tmp_path / "nowhere")


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("nth", [1, 2])
def test_first_save_that_fails_leaves_no_sae(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, nth: int
) -> None:
    import os

    owner = os if step == "fsync" else Path
    original, calls = getattr(owner, step), 0

    def failing(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise OSError(28, "No space left on device")
        return original(*args)

    monkeypatch.setattr(owner, step, failing)
    with pytest.raises(StorageError, match="No space left"):
        random_sae().save(tmp_path)
    monkeypatch.undo()
    with pytest.raises(MissingFileError):
        SAE.load(tmp_path)
    random_sae().save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "sae.safetensors"]
    SAE.load(tmp_path)


def test_weights_of_one_sae_with_the_config_of_another_are_refused(tmp_path: Path) -> None:
    first = random_sae().save(tmp_path / "a")
    other = random_sae()
    other.b_enc.add_(1)
    second = other.save(tmp_path / "b")
    (first / "sae.safetensors").write_bytes((second / "sae.safetensors").read_bytes())
    with pytest.raises(CorruptFileError, match="of another SAE"):
        SAE.load(first)
