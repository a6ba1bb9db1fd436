#!/usr/bin/env bash
# An environment of its own for a peer that a benchmark runs: .venv-peers/PEER, not under git.
#
#     benchmarks/peers/make_env.sh PEER [==VERSION]
#         PEER: sae-lens, eai-sparsify, dictionary-learning, eai-delphi, sae-dashboard
#     benchmarks/peers/make_env.sh all
#
# torch comes first and stays: any looser request pulls gigabytes of CUDA packages on Linux.
set -euo pipefail
cd "$(dirname "$0")/../.."
peers="sae-lens eai-sparsify dictionary-learning eai-delphi sae-dashboard"
peer=${1:?name a peer: $peers, or all}
version=${2:-}
if [ "$peer" = all ]; then
    for each in $peers; do "benchmarks/peers/make_env.sh" "$each"; done
    exit
fi
torch=$(grep '^torch==' constraints.txt)
folder=.venv-peers/$peer
"${PYTHON:-python3}" -m venv "$folder"
pip=("$folder/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" "$torch"
if [ "$peer" = eai-delphi ]; then
    # It asks for vllm and bitsandbytes, which pull CUDA; what reads codes needs these alone.
    "${pip[@]}" --no-deps "$peer${version:-==0.1.3}" sentence_transformers
    "${pip[@]}" --constraint <(echo "$torch") \
        aiofiles asyncer beartype blobfile faiss-cpu fire jaxtyping orjson psutil safetensors \
        scikit-learn simple_parsing transformers httpx2
elif [ "$peer" = sae-dashboard ]; then
    # transformer-lens 2 holds numpy below 2, which newer pyarrow refuses when it is imported.
    "${pip[@]}" --constraint <(echo "$torch") "$peer${version:-==0.8.0}" pyarrow==21.0.0
else
    "${pip[@]}" --constraint <(echo "$torch") "$peer$version"
fi
if [ "$peer" = dictionary-learning ] || [ "$peer" = sae-dashboard ]; then
    # nnsight pulls in a torchvision built for CUDA, which the CPU's torch can't load; transformers
    # imports it wherever it finds it, and then the peer imports no more.
    "$folder/bin/python" -m pip uninstall --quiet --yes torchvision
fi
"$folder/bin/python" -m pip list --disable-pip-version-check |
    grep -iE "^($peer|torch|datasets|pyarrow|transformer|nnsight)"
