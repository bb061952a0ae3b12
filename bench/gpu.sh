#!/usr/bin/env bash
# Checks and benches on a CUDA device, in parts of a few minutes; needs no network and no installation of this package.
#
#     [PYTHON=python3] [RESULTS=bench/results] bash bench/gpu.sh [1|fit] [2|choose] [3|model] [tests]
#
# Without a part: 1, 2 and 3. kernels/ppcl_kernels/tools/gpu_run.py describes the parts.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/train${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m ppcl_kernels.tools.gpu_run "$@"
