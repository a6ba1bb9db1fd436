"""The cache on disk against what the disk, the memory and SAELens' cache do, in one run.

    python benchmarks/storage.py [--folder DISK] [--gb 2] [--only write in_order ...] [--json]
    python benchmarks/storage.py --memory-gb 20 [--folder DISK] [--json]

Rows are random and no model runs. `write`: through the writer of `harvest`, against `dd` with
fsync, of one file and of as many files as there are shards. `in_order`: a cold cache through
`chunks`, against reading its files into one buffer. `shuffled`: batches out of the page cache,
against gathering rows from a tensor. `peer`: the same rows through SAELens' store (make its
environment first: benchmarks/peers/make_env.sh sae-lens). With --memory-gb instead: the peak
memory of a process that writes so large a cache, and of two that read it.

Everything is measured in turn, several rounds, each of which begins with another; a ratio is the
median of the rounds' ratios. Take --repeat 6, and a machine that does nothing else. What is written
goes to a temporary folder in --folder and is removed.
"""

import argparse
import gc
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import Paired, arguments, in_rounds, show
from made_cache import HOOKPOINT, PASS_ROWS, can_store, random_passes, write_cache
from safetensors.torch import save_file

from activation_cache import ActivationCache

HERE = Path(__file__).resolve().parent
PEER_PYTHON = HERE.parent / ".venv-peers" / "sae-lens" / "bin" / "python"
BATCH = 4_096
_BUFFER_BYTES = 8 << 20
_WINDOW_BYTES = 256_000_000  # the default of ActivationCache.open
_PEER_BUFFER_ROWS = 5_120  # 20 prompts of 256 tokens: SAELens' default, n_batches_in_buffer
_DROP_CACHES = Path("/proc/sys/vm/drop_caches")


# -- write -------------------------------------------------------------------------------------


def write(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """MB/s of rows that become a finished cache, against dd with fsync."""
    passes, n_rows = random_passes(args.passes, args.d_model), rows_of(args)
    cache, zeros = folder / "acts", folder / "zeros"
    write_cache(cache, passes, n_rows)
    n_bytes, n_shards = size_of(cache), len(list(cache.glob("shards/*.json")))

    def start_afresh() -> None:
        shutil.rmtree(cache, ignore_errors=True)
        shutil.rmtree(zeros, ignore_errors=True)
        zeros.mkdir()
        os.sync()

    seconds = in_rounds(
        {
            "our cache": lambda: write_cache(cache, passes, n_rows),
            "dd, one file": lambda: dd(zeros, n_bytes, 1),
            f"dd, {n_shards} files": lambda: dd(zeros, n_bytes, n_shards),
        },
        args.repeat,
        before=start_afresh,
    )
    return against("write", n_bytes, seconds, goal=0.8)


def dd(folder: Path, n_bytes: int, n_files: int) -> None:
    """Write zeros with dd, each file with an fsync of its own."""
    for number in range(n_files):
        size = n_bytes * (number + 1) // n_files - n_bytes * number // n_files
        command = ["dd", "if=/dev/zero", f"of={folder / str(number)}", "bs=8M", "conv=fsync"]
        command += ["iflag=count_bytes", f"count={size}"]
        subprocess.run(command, check=True, capture_output=True)


# -- read in order -----------------------------------------------------------------------------


def in_order(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """MB/s of a cold cache, opened and read through `chunks`, against its bare files."""
    cache = folder / "acts"
    write_cache(cache, random_passes(args.passes, args.d_model), rows_of(args))
    seconds = in_rounds(
        {
            f"our cache, cold by {args.cold}": lambda: read_in_order(cache),
            "readv of its files": lambda: read_files(cache),
        },
        args.repeat,
        before=lambda: forget_pages(cache, args.cold),
    )
    return against("in_order", size_of(cache), seconds, goal=0.9)


def read_in_order(folder: Path) -> float:
    """Every row of the cache, verified and in float32."""
    chunks = ActivationCache.open(folder).chunks(HOOKPOINT)
    return sum(float(chunk.acts[-1, -1]) for chunk in chunks)


def read_files(folder: Path) -> None:
    """Every byte of every file, into one buffer that is used again and again."""
    buffer = bytearray(_BUFFER_BYTES)
    for file in files_of(folder):
        handle = os.open(file, os.O_RDONLY)
        while os.readv(handle, [buffer]):
            pass
        os.close(handle)


def forget_pages(folder: Path, how: str) -> None:
    """Take the files' pages out of memory; a page that is still mapped somewhere stays."""
    gc.collect()
    os.sync()
    if how == "drop_caches":
        _DROP_CACHES.write_text("3")
        return
    for file in files_of(folder):
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


# -- shuffled batches --------------------------------------------------------------------------


def shuffled(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """GB/s of stored bytes and tokens/s of shuffled float32 batches out of the page cache."""
    passes, n_rows = random_passes(args.passes, args.d_model), rows_of(args)
    candidates: dict[str, Callable[[], Any]] = {}
    row_bytes: dict[str, float] = {}
    for dtype in filter(can_store, ("bfloat16", "float32", "int8")):
        cache, name = folder / dtype, f"our cache, {dtype}"
        write_cache(cache, passes, n_rows, storage_dtype=dtype)
        read_files(cache)
        row_bytes[name] = size_of(cache) / n_rows
        candidates[name] = lambda cache=cache: read_shuffled(cache)
    for dtype in (torch.bfloat16, torch.float32):
        name = f"rows in memory, {str(dtype).removeprefix('torch.')}"
        row_bytes[name] = args.d_model * dtype.itemsize
        rows = torch.cat([p.to(dtype) for p in passes])
        candidates[name] = lambda rows=rows: gather(rows, n_rows)
    seconds = in_rounds(candidates, args.repeat, n_warmup=1)
    return [
        {
            "part": "shuffled",
            "what": name,
            "bytes_per_token": row_bytes[name],
            **speeds([n_rows * row_bytes[name] / s / 1e9 for s in times], "gb_per_s"),
            "tokens_per_s": n_rows / statistics.median(times),
            "goal": 1.0 if name == "our cache, bfloat16" else None,
        }
        for name, times in seconds.items()
    ]


def read_shuffled(folder: Path) -> int:
    """The batches of one epoch, from opening the cache on. Returns: rows."""
    cache = ActivationCache.open(folder, window_bytes=_WINDOW_BYTES)
    return sum(len(batch) for batch in cache.batches(HOOKPOINT, BATCH, split="all"))


def gather(rows: torch.Tensor, n_rows: int) -> None:
    """As many random rows, a batch at a time, from a tensor: what no disk is needed for."""
    for _ in range(0, n_rows, BATCH):
        rows[torch.randint(len(rows), (BATCH,))].to(torch.float32, copy=True)


# -- the peer ----------------------------------------------------------------------------------


def peer(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Tokens/s of shuffled batches, against SAELens' store of the same rows: as it is set up by
    default, and with a buffer of as many rows as our window."""
    if not PEER_PYTHON.exists():
        print("no SAELens to compare with: benchmarks/peers/make_env.sh sae-lens", file=sys.stderr)
        return []
    n_rows = max(args.peer_rows // PASS_ROWS, 1) * PASS_ROWS
    window = min(_WINDOW_BYTES // (2 * args.d_model), n_rows)
    passes = random_passes(args.passes, args.d_model, torch.float32)
    save_file({f"{i:06d}": rows for i, rows in enumerate(passes)}, folder / "passes.safetensors")
    ours, theirs = folder / "ours", folder / "theirs"
    write_cache(ours, passes, n_rows)
    command = [str(PEER_PYTHON), str(HERE / "peers" / "sae_lens_cache.py")]
    command += ["--cache", str(theirs), "--passes", str(folder / "passes.safetensors")]
    command += ["--rows", str(n_rows), "--dtype", args.peer_dtype, "--threads", str(args.threads)]
    made = last_json([*command, "write"])
    read_files(folder)
    name, places = f"SAELens {made['version']}, {args.peer_dtype}", [ours, theirs, theirs]
    buffers = [window, _PEER_BUFFER_ROWS, window]
    seconds: list[list[float]] = [[], [], []]
    for _ in range(args.repeat):
        seconds[0] += in_rounds({"": lambda: read_shuffled(ours)}, 1, n_warmup=1)[""]
        for times, rows in zip(seconds[1:], buffers[1:], strict=True):
            times.append(last_json([*command, "read", "--buffer-rows", str(rows)])["seconds"])
    return [
        {
            "part": "peer",
            "what": "our cache, bfloat16" if place is ours else name,
            "shuffled_rows": buffer,
            "bytes_per_token": size_of(place) / n_rows,
            **speeds([n_rows / s for s in times], "tokens_per_s"),
            **ratios(Paired.over(seconds[0], times)),
            "goal": None if place is ours else 8.0,
        }
        for place, buffer, times in zip(places, buffers, seconds, strict=True)
    ]


def last_json(command: list[str]) -> dict[str, Any]:
    """Run a Python script and read the last line that it prints. A peer sees none of our path."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if command[0] == sys.executable:
        env["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


# -- memory ------------------------------------------------------------------------------------


def memory(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Peak memory of processes that write the cache and read it, beyond that of `import torch`."""
    n_rows = rows_of(args, args.memory_gb)
    common = [sys.executable, str(HERE / "peak_memory.py"), str(folder / "acts")]
    common += ["--rows", str(n_rows), "--d-model", str(args.d_model)]
    common += ["--seconds", str(args.memory_seconds), "--threads", str(args.threads)]
    rows = []
    for task in ("write", "shuffled", "in_order"):
        peak = last_json([*common, task])
        rows.append({"part": "memory", "what": task, "cache_gb": args.memory_gb, **peak})
    return [{**row, "goal": 1.0} for row in rows]


# -- the whole ---------------------------------------------------------------------------------


PARTS = {part.__name__: part for part in (write, in_order, shuffled, peer)}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="a folder on the disk")
    parser.add_argument("--gb", type=float, default=2.0, help="size of the cache in bfloat16")
    parser.add_argument("--d-model", type=int, default=576)
    parser.add_argument("--passes", type=int, default=128, help="passes of rows that differ")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--peer-rows", type=int, default=1 << 19)
    parser.add_argument("--peer-dtype", default="float32", help="of SAELens on disk")
    parser.add_argument("--cold", choices=["drop_caches", "fadvise"], default=best_way_to_forget())
    parser.add_argument("--memory-gb", type=float, help="measure memory instead, on so much")
    parser.add_argument("--memory-seconds", type=float, default=60, help="of shuffled reading")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    require_space(args)
    parts = [memory] if args.memory_gb else [PARTS[name] for name in args.only]
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder goes
    try:
        for part in parts:
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                if rows := part(args, Path(folder)):
                    show("storage", rows, args.json)
    finally:
        signal.signal(signal.SIGTERM, before)


def best_way_to_forget() -> str:
    return "drop_caches" if os.access(_DROP_CACHES, os.W_OK) else "fadvise"


def require_space(args: argparse.Namespace) -> None:
    """Ends the program where the disk has no room for the largest of what will stand there."""
    peer_gb = args.peer_rows * args.d_model * 7 / 1e9 if "peer" in args.only else 0
    needed = args.memory_gb or max(args.gb * (4 if "shuffled" in args.only else 1), peer_gb)
    free = shutil.disk_usage(args.folder).free / 1e9
    if needed * 1.05 > free:
        raise SystemExit(
            f"{args.folder} has {free:.1f} GB free, this needs {needed * 1.05:.1f}: name another "
            "disk with --folder, or lower --gb, --peer-rows or --memory-gb"
        )


def rows_of(args: argparse.Namespace, gb: float | None = None) -> int:
    """Rows of a bfloat16 cache of so many GB, in whole passes."""
    return max(int((gb or args.gb) * 1e9 / (args.d_model * 2) / PASS_ROWS), 1) * PASS_ROWS


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in files_of(folder))


def against(
    part: str, n_bytes: int, seconds: dict[str, list[float]], goal: float
) -> list[dict[str, Any]]:
    """Speeds of the candidates; the first is ours, the others are its limits."""
    ours = next(iter(seconds))
    return [
        {
            "part": part,
            "what": name,
            "gb": n_bytes / 1e9,
            **speeds([n_bytes / 1e6 / s for s in times], "mb_per_s"),
            **ratios(Paired.over(seconds[ours], times)),
            "goal": None if name == ours else goal,
        }
        for name, times in seconds.items()
    ]


def speeds(values: list[float], unit: str) -> dict[str, float]:
    return {unit: statistics.median(values), "lowest": min(values), "highest": max(values)}


def ratios(paired: Paired) -> dict[str, float]:
    median, lowest, highest = paired
    return {"ours_over_this": median, "ratio_lowest": lowest, "ratio_highest": highest}


if __name__ == "__main__":
    main()
