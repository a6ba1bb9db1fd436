"""sae-dashboard's data of features, for `index_peers.py`, of given codes.

Its own `SaeVisRunner.run` with its defaults: correlations, quantiles, histograms, strongest and
sampled sequences, logits. Stand-ins give it the codes: a model whose activations are rows' numbers,
and a StandardSAE whose acts are the codes of those rows. Its functions are timed from outside; the
rest is masks of every feature's acts and the product of the directions with the unembedding.
Left out or small, all in its favour: its model, its encoder (dense acts are timed apart), a d_model
of 64, and writing JSON or HTML.
"""

import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import torch
from peak import peak_bytes
from sae_dashboard import sae_vis_runner
from sae_dashboard.components import ActsHistogramData, LogitsHistogramData
from sae_dashboard.feature_data_generator import FeatureDataGenerator
from sae_dashboard.sae_vis_data import SaeVisConfig, SaeVisData
from sae_dashboard.sequence_data_generator import SequenceDataGenerator
from sae_dashboard.utils_fns import FeatureStatistics
from sae_lens import StandardSAE, StandardSAEConfig
from transformer_lens.hook_points import HookPoint

HOOK = "blocks.0.hook_resid_pre"
D_MODEL = 64


class GivenCodes(StandardSAE):
    """acts = the codes of row x[..., 0], of the features whose numbers are in W_enc[0].

    sae-dashboard cuts W_enc down to the features that it asks for.
    """

    def __init__(self, codes: dict[str, torch.Tensor], d_sae: int) -> None:
        super().__init__(StandardSAEConfig(d_in=D_MODEL, d_sae=d_sae))
        self.features, self.acts = (codes[name].flatten(0, 1) for name in ("features", "acts"))
        self.W_dec.data = torch.nn.functional.normalize(torch.randn(d_sae, D_MODEL), dim=1)
        self.W_enc.data[0] = torch.arange(d_sae)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, seq, d_model]. Returns: [batch, seq, features that are asked for]."""
        rows, asked = x[..., 0].long(), self.W_enc[0].round().long()
        column = torch.full((self.cfg.d_sae,), len(asked))  # the last one takes all others
        column[asked] = torch.arange(len(asked))
        acts = torch.zeros(*rows.shape, len(asked) + 1)
        acts.scatter_(2, column[self.features[rows].long()], self.acts[rows])
        return acts[..., :-1].contiguous()


class GivenRows:
    """The model: row i's activation is i, then zeros. Batches come in order, over and over."""

    def __init__(self, n_rows: int, n_vocab: int) -> None:
        self.W_U = torch.randn(D_MODEL, n_vocab)
        self.hook_dict = {HOOK: HookPoint()}
        self.n_rows, self.n_given = n_rows, 0

    def run_with_hooks(
        self, tokens: torch.Tensor, *, fwd_hooks: list[tuple[str, Callable[..., None]]], **_: int
    ) -> None:
        """tokens: [batch, seq]; only how many there are matters."""
        x = torch.zeros(*tokens.shape, D_MODEL)
        x[..., 0] = (self.n_given + torch.arange(tokens.numel())).view(tokens.shape)
        self.n_given = (self.n_given + tokens.numel()) % self.n_rows
        for name, hook in fwd_hooks:
            hook(x, self.hook_dict[name])


TIMED = [
    (GivenCodes, "encode", "dense acts"),
    (FeatureDataGenerator, "update_rolling_coefficients", "correlations"),
    (sae_vis_runner, "get_features_table_data", "correlations"),
    (FeatureStatistics, "create", "quantiles"),
    (ActsHistogramData, "from_data", "histograms"),
    (SequenceDataGenerator, "get_sequences_data", "sequences"),
    (LogitsHistogramData, "from_data", "logits"),
    (sae_vis_runner, "get_logits_table_data", "logits"),
]


def main() -> None:
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    codes = {name: torch.from_numpy(each) for name, each in np.load(spec["codes"]).items()}
    few = {name: each[:16] for name, each in codes.items()}
    index(few, {**spec, "features": spec["features"][:4]})  # what happens once has happened
    before = psutil.Process().memory_info().rss
    seconds = dict.fromkeys([stage for _, _, stage in TIMED], 0.0)
    for owner, name, stage in TIMED:
        time_into(seconds, stage, owner, name)
    data, all_s = index(codes, spec)
    seconds["the rest"] = all_s - sum(seconds.values())
    peak_gb = (peak_bytes() - before) / 1e9
    np.savez(spec["found"], **found(data, spec["features"]))
    version = importlib.metadata.version("sae-dashboard")
    print(json.dumps({"seconds": seconds, "peak_gb": peak_gb, "version": version}))


def index(codes: dict[str, torch.Tensor], spec: dict[str, Any]) -> tuple[SaeVisData, float]:
    """Returns: the data of the features asked for, and the seconds that they took."""
    tokens = codes["tokens"].long()
    sae, model = GivenCodes(codes, spec["d_sae"]), GivenRows(tokens.numel(), spec["n_vocab"])
    runner = sae_vis_runner.SaeVisRunner(SaeVisConfig(HOOK, spec["features"]))
    started = time.perf_counter()
    data = runner.run(sae, model, tokens)  # type: ignore[arg-type]
    return data, time.perf_counter() - started


def time_into(seconds: dict[str, float], stage: str, owner: Any, name: str) -> None:
    """From now on, what a function takes is added to a stage's seconds."""
    function = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = function(*args, **kwargs)
        seconds[stage] += time.perf_counter() - started
        return result

    setattr(owner, name, timed)


def found(data: SaeVisData, features: list[int]) -> dict[str, np.ndarray]:
    """What can be held to the codes, a row a feature: its strongest act, the share of tokens where
    it is active, and of its strongest sequences the marked row and its act (to 4 decimals)."""
    top = [data.feature_data_dict[f].sequence_data.seq_group_data[0].seq_data for f in features]
    before = data.cfg.feature_centric_layout.seq_cfg.buffer[0]  # tokens ahead of the marked one
    return {
        "strongest": np.array(data.feature_stats.max, np.float32),
        "density": np.array(data.feature_stats.frac_nonzero, np.float32),
        "blocks": np.array([[each.original_index for each in one] for one in top]),
        "places": np.array([[each.qualifying_token_index for each in one] for one in top]),
        "acts": np.array([[each.feat_acts[before] for each in one] for one in top]),
        "tokens": np.array([[each.token_ids[before] for each in one] for one in top]),
    }


if __name__ == "__main__":
    main()
