"""`saebase train`: every architecture and wiring, sweeps, and what several processes make."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from activation_cache import ActivationCache
from pipelines.config import read_config
from pipelines.ranks import first_node
from pipelines.sae_settings import owners_of
from pipelines.sweep import RunSettings, axes_of, specs_of, texts_of
from sae import SAE, TrainConfig
from sae.architectures import ARCHITECTURES
from tests.pipelines.conftest import Outcome, config_text

Saebase = Callable[..., Outcome]
PLACES = ("layers.1.resid_post", "layers.1.mlp_out")
SIZES = ("--d-sae", 64, "--batch-size", 64, "--init-rows", 64)
SIZES += ("--calibration-rows", 256, "--log-every-steps", 1)
SHORT = (*SIZES, "--n-steps", 4)


@pytest.fixture
def acts(tiny_cache: ActivationCache) -> str:
    """A cache with two places."""
    return str(tiny_cache.path)


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_every_architecture_trains_with_flags_of_its_own(
    saebase: Saebase, acts: str, tmp_path: Path, architecture: str
) -> None:
    own: dict[str, tuple[object, ...]] = {
        "matryoshka": ("--k", 4, "--prefixes", 16, 64),
        "hierarchical_topk": ("--k", 4, "--ks", 2, 4),
        "jumprelu": ("--recipe", "tanh", "--target-l0", 8),
        "gated": ("--coefficient", 2),
        "relu": ("--sparsity-warmup-fraction", 0.5),
    }
    outcome = saebase(
        *("train", "--acts", acts, "--out", tmp_path / "sae", "--hookpoint", PLACES[0], *SHORT),
        *("--architecture", architecture, *own.get(architecture, ("--k", 4))),
    )
    assert outcome.status == 0, outcome.err
    sae = SAE.load(tmp_path / "sae")
    assert sae.architecture == architecture
    given = own.get(architecture, ("--k", 4))
    assert getattr(sae.config, str(given[0])[2:].replace("-", "_")) == given[1]
    assert f"{architecture} SAE at {PLACES[0]}" in outcome.out


def test_every_setting_of_an_architecture_is_a_flag(saebase: Saebase) -> None:
    text = saebase("train", "--help").out
    for architecture in ARCHITECTURES.values():
        for name in architecture.config_class.model_fields:
            assert f"--{name.replace('_', '-')} " in text, name
    assert owners_of("prefixes") == ["matryoshka"]


@pytest.mark.parametrize(
    ("flags", "reads", "writes"),
    [
        (("--reads", PLACES[0], "--writes", PLACES[1]), PLACES[:1], PLACES[1:]),
        (("--reads", PLACES[0], "--writes", PLACES[1], "--skip"), PLACES[:1], PLACES[1:]),
        (("--hookpoints", *PLACES), PLACES, PLACES),
    ],
    ids=["transcoder", "skip", "crosscoder"],
)
def test_wirings_train(
    saebase: Saebase,
    acts: str,
    tmp_path: Path,
    flags: tuple[str, ...],
    reads: tuple[str, ...],
    writes: tuple[str, ...],
) -> None:
    outcome = saebase("train", "--acts", acts, "--out", tmp_path, *SHORT, "--k", 4, *flags)
    assert outcome.status == 0, outcome.err
    wiring = SAE.load(tmp_path).wiring
    assert wiring is not None
    assert (wiring.reads, wiring.writes, wiring.skip) == (reads, writes, "--skip" in flags)


def test_a_sweep_makes_what_single_runs_make(saebase: Saebase, acts: str, tmp_path: Path) -> None:
    train = ("train", "--acts", acts, *SHORT, "--hookpoint", PLACES[0])
    outcome = saebase(
        *(*train, "--out", tmp_path / "many"),
        *("--sweep", "k=2,4", "--sweep", "lr=3e-4,1e-3", "--plot", tmp_path / "many.html"),
    )
    assert outcome.status == 0, outcome.err
    found = json.loads((tmp_path / "many" / "sweep.json").read_text())
    assert [run["folder"] for run in found["runs"]] == [
        f"k={k},lr={lr}" for k in (2, 4) for lr in ("0.0003", "0.001")
    ]
    assert found["runs"][2]["values"] == {"k": 4, "lr": 0.0003}
    rows = [line.split() for line in outcome.out.splitlines() if line[:1].isdigit()]
    fvus = [float(row[2]) for row in rows]
    assert len(rows) == 4
    assert fvus == sorted(fvus)
    assert "k=4,lr=0.0003" in (tmp_path / "many.html").read_text()
    one = saebase(*train, "--out", tmp_path / "one", "--k", 4, "--lr", 0.001)
    assert one.status == 0, one.err
    weights = [
        f / "sae.safetensors" for f in (tmp_path / "one", tmp_path / "many" / "k=4,lr=0.001")
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    before = weights[1].stat().st_mtime_ns
    more = saebase(*(*train, "--out", tmp_path / "many"), "--sweep", "k=4,8", "--lr", 0.001)
    assert more.status == 0, more.err
    again = saebase(*(*train, "--out", tmp_path / "many"), "--sweep", "k=4", "--sweep", "lr=0.001")
    assert again.status == 0, again.err
    assert weights[1].stat().st_mtime_ns == before
    assert len(json.loads((tmp_path / "many" / "sweep.json").read_text())["runs"]) == 6


def test_a_sweep_in_a_file(saebase: Saebase, acts: str, tmp_path: Path) -> None:
    settings = tmp_path / "train.yaml"
    settings.write_text(
        "sweep: {architecture: [topk, relu], k: [2], hookpoint: [layers.1.resid_post]}\n"
    )
    command = ("train", "--config", settings, "--acts", acts, "--out", tmp_path / "many", *SHORT)
    outcome = saebase(*command)
    assert outcome.status == 0, outcome.err
    folders = {f.name for f in (tmp_path / "many").iterdir() if f.is_dir()}
    place = f"hookpoint={PLACES[0]}"
    assert folders == {f"architecture=topk,k=2,{place}", f"architecture=relu,{place}"}


def specs(*sweep: str, architecture: str = "topk", **sae: object) -> list[Path]:
    base = RunSettings(architecture, "p", {"d_sae": 64, **sae}, TrainConfig(seed=5))
    made = specs_of(base, axes_of(sweep), Path("out"))
    assert {spec.train_config.data_seed for spec in made} <= {5, None}
    return [spec.out for spec in made]


def test_seeds_of_a_sweep_share_their_batches() -> None:
    base = RunSettings("topk", "p", {"d_sae": 8, "k": 2}, TrainConfig())
    made = specs_of(base, axes_of(["seed=0,1,2"]), Path("o"))
    assert [spec.train_config.seed for spec in made] == [0, 1, 2]
    assert [spec.train_config.data_seed for spec in made] == [0, 0, 0]


def test_each_architecture_takes_the_axes_that_it_has() -> None:
    made = specs("architecture=topk,jumprelu", "k=2,4", "target_l0=3,5", "seed=0,1")
    assert len(made) == 2 * 2 + 2 * 2
    assert Path("out/architecture=jumprelu,target_l0=5,seed=1") in made
    assert specs("prefixes=[8,64],[16,64]", architecture="matryoshka", k=2) == [
        Path("out/prefixes=8+64"),
        Path("out/prefixes=16+64"),
    ]
    assert axes_of(texts_of({"k": [1, 2], "prefixes": [[8, 64]], "lr": 0.1})) == {
        "k": [1, 2],
        "prefixes": [[8, 64]],
        "lr": [0.1],
    }


def test_configurations_take_wirings_and_sweeps(
    small_model: Path, small_text: Path, tmp_path: Path
) -> None:
    lines = config_text(small_model, small_text, tmp_path / "out")
    file = tmp_path / "c.yaml"
    file.write_text(
        lines.replace("hookpoints: [layers.1.resid_post]", "wiring: {reads: [a, b]}")
        + "sweep: {k: [2, 3], seed: [0, 1]}\n"
    )
    config = read_config(file)
    assert config.places == ["a", "b"]
    ((out, made),) = config.runs()
    assert out == tmp_path / "out" / "run"
    assert [spec.out.name for spec in made] == [f"k={k},seed={s}" for k in (2, 3) for s in (0, 1)]
    assert {getattr(spec.hookpoint, "writes", None) for spec in made} == {("a", "b")}


def test_first_of_slurms_nodes() -> None:
    assert [first_node(n) for n in ("gpu[003-007,12],login", "a,b", "n7", "c[4,6]")] == [
        "gpu003",
        "a",
        "n7",
        "c4",
    ]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def torchrun(acts: str, out: Path, n_steps: int, *flags: object) -> subprocess.Popen[str]:
    """The command in two processes, as a user starts it."""
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--master-port", str(free_port()), "-m", "pipelines", "train", "--acts", acts]
    given = ("--out", out, "--hookpoint", PLACES[0], "--k", 4, *SIZES, "--n-steps", n_steps)
    return subprocess.Popen(
        [sys.executable, *launch, *map(str, (*given, *flags))],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.timeout(600)
def test_two_processes_make_one_sae_and_go_on_after_a_kill(acts: str, tmp_path: Path) -> None:
    whole = torchrun(acts, tmp_path / "whole", 60)
    out, err = whole.communicate(timeout=200)
    assert whole.returncode == 0, err
    assert out.count("next:") == 1
    assert sorted(f.name for f in (tmp_path / "whole").iterdir() if f.name[0] != ".") == [
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "sae.safetensors",
    ]
    flags = ("--checkpoint-every-steps", 7)
    killed = torchrun(acts, tmp_path / "killed", 60, *flags)
    checkpoints = tmp_path / "killed" / "checkpoints"
    while killed.poll() is None and not list(checkpoints.glob("step-*")):
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    for process in children_of(str(tmp_path / "killed")):
        os.kill(process, signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "killed" / "config.json").exists()
    resumed = torchrun(acts, tmp_path / "killed", 60, *flags)
    _, err = resumed.communicate(timeout=200)
    assert resumed.returncode == 0, err
    hashes = [
        sha256((tmp_path / name / "sae.safetensors").read_bytes()).hexdigest()
        for name in ("whole", "killed")
    ]
    assert hashes[0] == hashes[1]


def children_of(argument: str) -> list[int]:
    """Processes of this test that torchrun started in sessions of their own."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if argument in (folder / "cmdline").read_text().split("\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def test_processes_of_srun_meet_and_one_tells_a_mistake(acts: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipelines", "train", "--acts", acts, "--out", str(tmp_path)]
    command += [*map(str, SHORT), "--k", "4", "--reads", PLACES[0]]
    slurm = {
        **{"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": "7"},
        **{"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"},
    }
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **slurm, "SLURM_PROCID": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert told == [
        "saebase: a transcoder needs --reads and --writes; --writes is missing\n",
        "",
    ]
