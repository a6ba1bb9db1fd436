"""Our counting beside eai-delphi's contexts: the same codes, one thread, in turn, in one run.

    PYTHONPATH=. python benchmarks/index_peers.py --delphi .venv-peers/eai-delphi/bin/python
        [--n-tokens 262144] [--d-sae 16384] [--k 32] [--repeat 3] [--json]

Each in a process of its own; the median microseconds a token of each stage, and the most memory
that a process had beyond its imports and the text (delphi's codes are in memory too, before).
That delphi's strongest act of every feature is the codes' own is checked in each round.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from machine import arguments, show
from made_codes import made_codes, made_rows

_HERE = Path(__file__).parent
_BLOCK = 256


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--delphi", default=".venv-peers/eai-delphi/bin/python")
    parser.add_argument("--n-tokens", type=int, default=1 << 18)
    parser.add_argument("--d-sae", type=int, default=16_384)
    parser.add_argument("--k", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        strongest = write_codes(Path(folder), args)
        rounds = [in_one_round(Path(folder), strongest, args) for _ in range(args.repeat)]
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


def write_codes(folder: Path, args: argparse.Namespace) -> Any:
    """Codes on disk, by blocks of 256 tokens. Returns: [d_sae] the strongest act, as float16."""
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
    strongest = np.zeros(args.d_sae, np.float32)
    np.maximum.at(strongest, features, acts.astype(np.float16).astype(np.float32))
    return strongest


def in_one_round(folder: Path, strongest: Any, args: argparse.Namespace) -> dict[str, Any]:
    """What each took, one after the other."""
    numbers = [f"--n-tokens={args.n_tokens}", f"--d-sae={args.d_sae}", f"--k={args.k}"]
    ours = ran([sys.executable, str(_HERE / "counting.py"), *numbers])
    found = folder / "strongest.npy"
    spec = {"codes": str(folder / "codes.npz"), "strongest": str(found), "d_sae": args.d_sae}
    delphi = ran([args.delphi, str(_HERE / "peers" / "index_delphi.py"), json.dumps(spec)])
    n_wrong = int((np.load(found) != strongest).sum())
    if n_wrong:
        raise SystemExit(f"delphi's strongest act differs from the codes' in {n_wrong} features")
    delphi["microseconds"] = {
        part: 1e6 * seconds / args.n_tokens for part, seconds in delphi["seconds"].items()
    }
    return {"saebase": ours, f"eai-delphi {delphi['version']}": delphi}


def ran(command: list[str]) -> dict[str, Any]:
    """The JSON object that a process prints."""
    result: dict[str, Any] = json.loads(subprocess.check_output(command))
    return result


if __name__ == "__main__":
    main()
