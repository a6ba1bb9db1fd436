#!/usr/bin/env bash
# All that is worth knowing from one call on a lent GPU, in under ten minutes: the Triton kernels
# against float64, the step's time and memory, the other GPU tests. All it prints goes to $OUT too.
# Needs torch with Triton, and what sae imports. Wheels in .whl/ are installed for this call; where
# nothing can be fetched, bring them:
#   pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#       --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d .whl \
#       pydantic pydantic_core annotated_types typing_inspection pytest_timeout
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-.}
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD
if ls .whl/*.whl >/dev/null 2>&1; then
    python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/site .whl/*.whl
    export PYTHONPATH=$PWD:/tmp/site
fi
nvidia-smi | tee "$out/nvidia-smi.txt"
timeout 150 python3 -m pytest --noconftest -o addopts="--import-mode=importlib" \
    -o filterwarnings="" -o timeout=0 -ra tests/sae/test_triton_kernels.py 2>&1 |
    tee "$out/gpu-kernels.txt"
timeout 320 python3 benchmarks/gpu_step.py --minutes 4 2>&1 | tee "$out/gpu-step.jsonl"
timeout 110 python3 -m pytest -m gpu -o addopts="--import-mode=importlib" -o filterwarnings="" \
    -o timeout=0 tests/test_gpu.py 2>&1 | tee "$out/gpu-tests.txt"
