"""Our counting beside eai-delphi and sae-dashboard: the same codes, one thread, in turn.

    PYTHONPATH=. python benchmarks/index_peers.py --delphi .venv-peers/eai-delphi/bin/python
        --dashboard .venv-peers/sae-dashboard/bin/python
        [--n-tokens 262144] [--d-sae 16384] [--k 32] [--n-dashboard 256] [--repeat 3] [--json]

Each in a process of its own; the median microseconds a token of each stage, and the most memory
that a process had beyond its imports and the text (the peers' codes are in memory too, before).
A peer whose environment isn't there is left out, and a line says so. sae-dashboard reads all tokens
again for each 256 features: it is given so many, drawn at random, and its times are scaled to all.
What the peers found is held to the codes in each round: delphi's strongest act of every feature,
sae-dashboard's too, with its densities and the acts of all of its strongest sequences.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from machine import arguments, show
from made_codes import N_VOCAB, made_codes, made_rows

_HERE = Path(__file__).parent
_BLOCK = 256

Peer = Callable[[str, Path, argparse.Namespace], dict[str, Any]]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--delphi", default=".venv-peers/eai-delphi/bin/python")
    parser.add_argument("--dashboard", default=".venv-peers/sae-dashboard/bin/python")
    parser.add_argument("--n-tokens", type=int, default=1 << 18)
    parser.add_argument("--d-sae", type=int, default=16_384)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--n-dashboard", type=int, default=256, help="features for sae-dashboard")
    args = parser.parse_args()
    peers = those_there(args)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_codes(Path(folder), args)
        rounds = [in_one_round(Path(folder), peers, args) for _ in range(args.repeat)]
    rows = [
        {
            "what": who,
            "part": part,
            "microseconds_per_token": median(each[who]["microseconds"][part] for each in rounds),
            "peak_gb": max(each[who]["peak_gb"] for each in rounds),
        }
        for who in rounds[0]
        for part in rounds[0][who]["microseconds"]
    ]
    show("index beside the peers", rows, args.json)


def those_there(args: argparse.Namespace) -> dict[Peer, str]:
    """The peers that have an environment, with its python; the others are told in a line each."""
    pythons = {delphi: args.delphi, sae_dashboard: args.dashboard}
    there = {peer: python for peer, python in pythons.items() if Path(python).exists()}
    for peer in pythons.keys() - there.keys():
        print(f"{pythons[peer]}: no such python, so {peer.__name__} is left out", file=sys.stderr)
    if not there:
        raise SystemExit("no peer's python is there: benchmarks/peers/make_env.sh makes them")
    return there


def write_codes(folder: Path, args: argparse.Namespace) -> None:
    """Codes on disk, by blocks of 256 tokens: tokens [block, 256], features and acts [.., k]."""
    rows = made_rows(args.n_tokens)
    chunks = list(made_codes(rows, args.d_sae, args.k))
    features = np.concatenate([chunk.features for chunk in chunks])
    acts = np.concatenate([chunk.acts for chunk in chunks])
    np.savez(
        folder / "codes.npz",
        tokens=rows.token_ids.reshape(-1, _BLOCK),
        features=features.astype(np.int32).reshape(-1, _BLOCK, args.k),
        acts=acts.reshape(-1, _BLOCK, args.k),
    )


def in_one_round(folder: Path, peers: dict[Peer, str], args: argparse.Namespace) -> dict[str, Any]:
    """What each took, one after the other."""
    numbers = [f"--n-tokens={args.n_tokens}", f"--d-sae={args.d_sae}", f"--k={args.k}"]
    took = {"saebase": ran([sys.executable, str(_HERE / "counting.py"), *numbers])}
    for peer, python in peers.items():
        took |= peer(python, folder, args)
    return took


def delphi(python: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """eai-delphi, of all features. It keeps acts as float16."""
    found = folder / "strongest.npy"
    spec = {"codes": str(folder / "codes.npz"), "strongest": str(found), "d_sae": args.d_sae}
    told = ran([python, str(_HERE / "peers" / "index_delphi.py"), json.dumps(spec)])
    codes = np.load(folder / "codes.npz")
    strongest = np.zeros(args.d_sae, np.float32)
    np.maximum.at(strongest, codes["features"], codes["acts"].astype(np.float16))
    held_to_codes("delphi", {"strongest act": np.load(found) == strongest})
    return named(f"eai-delphi {told['version']}", told, args.n_tokens)


def sae_dashboard(python: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """sae-dashboard, of some features; microseconds are scaled to all."""
    n = min(args.n_dashboard, args.d_sae)
    features = np.sort(np.random.default_rng(0).choice(args.d_sae, n, replace=False))
    spec = {"codes": str(folder / "codes.npz"), "found": str(folder / "found.npz")}
    spec |= {"features": features.tolist(), "d_sae": args.d_sae, "n_vocab": N_VOCAB}
    told = ran([python, str(_HERE / "peers" / "index_sae_dashboard.py"), json.dumps(spec)])
    held_to_codes("sae-dashboard", of_dashboard(folder, features, args.d_sae))
    who = f"sae-dashboard {told['version']}, {n} of {args.d_sae} features, scaled"
    return named(who, told, args.n_tokens * n / args.d_sae)


def of_dashboard(folder: Path, features: Any, d_sae: int) -> dict[str, Any]:
    """By name of what it found, [features, ...] of whether the codes say the same.

    Its strongest sequences are about tokens that have 6 before them and 5 behind; acts are rounded
    to 4 decimals.
    """
    codes, found = np.load(folder / "codes.npz"), np.load(folder / "found.npz")
    column = np.full(d_sae, len(features))
    column[features] = np.arange(len(features))
    acts = np.zeros((*codes["tokens"].shape, len(features) + 1), np.float32)
    np.put_along_axis(acts, column[codes["features"]], codes["acts"], axis=2)
    acts = acts[..., :-1]
    inside = np.sort(acts[:, 6:-5].reshape(-1, len(features)), axis=0)
    at = found["blocks"], found["places"]
    return {
        "strongest act": found["strongest"] == acts.max((0, 1)),
        "density": np.isclose(found["density"], (acts > 0).mean((0, 1)), atol=1e-6),
        "strongest sequences": np.abs(found["acts"] - inside[-20:][::-1].T) < 1e-4,
        "act of a sequence": np.abs(found["acts"] - acts[*at, np.arange(len(features))[:, None]])
        < 1e-4,
        "token of a sequence": found["tokens"] == codes["tokens"][at],
    }


def held_to_codes(who: str, agreed: dict[str, Any]) -> None:
    """Raises: SystemExit where a peer found another thing than the codes hold."""
    for what, same in agreed.items():
        if not same.all():
            raise SystemExit(f"{who}: {what} differs from the codes' {(~same).sum()} times")


def named(who: str, told: dict[str, Any], n: float) -> dict[str, Any]:
    """What a peer took, under its name. n: the tokens that its seconds are for."""
    microseconds = {part: 1e6 * seconds / n for part, seconds in told["seconds"].items()}
    return {who: {**told, "microseconds": microseconds}}


def ran(command: list[str]) -> dict[str, Any]:
    """The JSON object that a process prints."""
    result: dict[str, Any] = json.loads(subprocess.check_output(command))
    return result


if __name__ == "__main__":
    main()
