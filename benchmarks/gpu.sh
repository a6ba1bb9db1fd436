#!/usr/bin/env bash
# All that is worth knowing from one call on a lent GPU: the GPU tests, then the training benchmark.
# Writes what it prints to $OUT (or the current folder) too. Needs torch; no installation.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-.}
export PYTHONUNBUFFERED=1
nvidia-smi | tee "$out/nvidia-smi.txt"
python3 -m pytest -m gpu -o addopts="--import-mode=importlib" -o filterwarnings="" -o timeout=0 \
    tests/test_gpu.py 2>&1 | tee "$out/gpu-tests.txt"
for d_sae in 16384 65536 131072; do
    python3 benchmarks/train.py --device cuda --d-model 2304 --d-sae "$d_sae" --k 64 --batch 8192 \
        --json 2>&1 | tee -a "$out/gpu-train.jsonl"
done
