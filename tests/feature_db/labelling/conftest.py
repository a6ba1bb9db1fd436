"""A database of features that are each one word, and a server that can judge them."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from activation_cache import LanguageModel, harvest
from feature_db import Endpoint, IndexConfig, LabelConfig, build_index
from sae import SAE, BatchTopKConfig, Origin
from tests.tiny_tokenizers import byte_level_bpe

from ..conftest import random_gpt2
from .judge_server import MODEL, JudgeServer

HOOKPOINT = "layers.0.resid_pre"
WORDS = [
    *("treaty", "judge", "river", "copper", "violin", "harbour", "senate", "orchid"),
    *("glacier", "tractor", "sonnet", "falcon", "cathedral", "molecule", "election", "kitchen"),
    *("lantern", "pepper", "railway", "thunder"),
]
FILLER = ["old", "very", "near", "still", "often", "then", "quite", "late", "soon", "far", "so"]
N_OCCURRENCES = 22


class Planted(NamedTuple):
    """path: the database. words: the word of each feature, by its id; the last has none."""

    path: Path
    words: list[str]


def texts() -> list[str]:
    """Documents in which every word occurs equally often, with filler between the words."""
    rng = random.Random(3)
    order = WORDS * N_OCCURRENCES
    rng.shuffle(order)
    pieces = [
        " ".join([*rng.choices(FILLER, k=6), word, *rng.choices(FILLER, k=4)]) for word in order
    ]
    return [" " + " ".join(pieces[i : i + 11]) for i in range(0, len(pieces), 11)]


def _language_model() -> LanguageModel:
    """A model whose first layer reads tokens of length 1 and almost no positions."""
    tokenizer = byte_level_bpe(texts(), 700, bos_token="<|end|>", eos_token="<|end|>")
    torch.manual_seed(0)
    model = random_gpt2(len(tokenizer), n_embd=64, n_layer=1)
    with torch.no_grad():
        model.transformer.wte.weight.copy_(
            torch.nn.functional.normalize(torch.randn(len(tokenizer), 64), dim=1)
        )
        model.transformer.wpe.weight.mul_(0.3)
    return LanguageModel(model, tokenizer, name="planted")


@pytest.fixture(scope="session")
def planted_index(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """The index, made once. Shared: copy it before it is written to."""
    folder = tmp_path_factory.mktemp("planted")
    lm = _language_model()
    cache = harvest(
        lm,
        texts(),
        hookpoints=[HOOKPOINT],
        out=folder / "acts",
        n_tokens=100_000,
        ctx_len=64,
        storage_dtype="float32",
    )
    ids = [lm.tokenizer(f" {word}").input_ids for word in WORDS]
    assert all(len(each) == 1 for each in ids), "every word is one token"
    origin = Origin(
        hookpoint=HOOKPOINT,
        max_norm=cache.max_norm(HOOKPOINT),
        provenance=cache.provenance(HOOKPOINT),
    )
    sae = SAE(BatchTopKConfig(d_sae=len(WORDS) + 1, k=1), 64, origin)
    sae.W_dec[:-1] = lm.model.transformer.wte.weight[[each[0] for each in ids]].detach()
    sae.W_dec[-1] = torch.nn.functional.normalize(torch.ones(64), dim=0)
    sae.W_enc_rows.copy_(sae.W_dec)
    sae.b_enc[-1] = -1e6
    sae.threshold.fill_(0.75)
    config = IndexConfig(
        n_top=40,
        max_per_document=40,
        tokens_before=5,
        tokens_after=3,
        quantile_sample=12,
        n_negatives=0,
    )
    return Planted(build_index(lm, [sae], cache, out=folder / "p.duckdb", config=config), WORDS)


@pytest.fixture
def planted(planted_index: Planted, tmp_path: Path) -> Planted:
    """A copy of the index to write to."""
    path = Path(shutil.copy(planted_index.path, tmp_path / "planted.duckdb"))
    return planted_index._replace(path=path)


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with JudgeServer() as running:
        yield running


@pytest.fixture
def endpoint(server: JudgeServer) -> Endpoint:
    return Endpoint(base_url=server.url, model=MODEL, timeout_s=5, concurrency=4)


@pytest.fixture
def config() -> LabelConfig:
    """Few and small requests."""
    return LabelConfig(n_shown=8, n_scored=8, contexts_per_request=8)
