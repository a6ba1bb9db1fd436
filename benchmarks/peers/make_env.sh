#!/usr/bin/env bash
# An environment of its own for a peer that a benchmark runs: .venv-peers/PEER, not under git.
#
#     benchmarks/peers/make_env.sh sae-lens [==6.54.12]
#
# torch comes first and stays: any looser request pulls gigabytes of CUDA packages on Linux.
set -euo pipefail
cd "$(dirname "$0")/../.."
peer=${1:?name a peer: sae-lens}
version=${2:-}
torch=$(grep '^torch==' constraints.txt)
folder=.venv-peers/$peer
"${PYTHON:-python3}" -m venv "$folder"
pip=("$folder/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" "$torch"
"${pip[@]}" --constraint <(echo "$torch") "$peer$version"
"$folder/bin/python" -m pip list --disable-pip-version-check | grep -iE "^($peer|torch|datasets|pyarrow|transformer)"
