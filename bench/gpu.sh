#!/usr/bin/env bash
# Tests and benches on a CUDA device; needs no network and no installation of this package, and nine minutes at most.
#
#     [PYTHON=python3] [RESULTS=bench/results] bash bench/gpu.sh [tests] [kernels] [model]       (none named: all)
#
# Each part writes $RESULTS/<device>/<part>.json, whether or not it passes. Exit status: 0 when all parts passed,
# 1 when one did not, 2 for a part that there is not and for a machine without a CUDA device.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

PYTHON=${PYTHON:-python3}
for part in "$@"; do
    case $part in
        tests | kernels | model) ;;
        *)
            echo "gpu.sh: there is no part $part; there are: tests, kernels, model" >&2
            exit 2
            ;;
    esac
done
[ $# -gt 0 ] || set -- tests kernels model
if ! "$PYTHON" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
    echo "gpu.sh: $PYTHON sees no CUDA device: run on a machine with one, or name its python by PYTHON=..." >&2
    exit 2
fi

export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD:$PWD/kernels:$PWD/train${PYTHONPATH:+:$PYTHONPATH}"
# Kernels run natively here.
unset TRITON_INTERPRET
left=$(mktemp -d)
trap 'rm -rf "$left"' EXIT
failed=0

# run_part NAME SECONDS OUTPUT COMMAND...
run_part() {
    local part=$1 seconds=$2 output=$3 status
    shift 3
    echo "== $part, at most $seconds s: $*"
    timeout --kill-after=10 "$seconds" "$@"
    status=$?
    [ $status -eq 0 ] || failed=1
    # By path: the package imports diffusers, which the kernels do without.
    PYTHONSAFEPATH=1 "$PYTHON" ppcl_rt/bench_report.py record "$part" --status "$status" \
        --command "bash bench/gpu.sh $part" --output "$output" --results "${RESULTS:-bench/results}" || failed=1
}

for part in "$@"; do
    case $part in
        tests)
            # What is marked gpu, and the tests of kernels and of models on them, which run natively here.
            # Hundreds of small kernels to compile: on all cores, where pytest-xdist is there.
            "$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-n 12) || workers=()
            run_part tests 150 "$left/tests.xml" \
                "$PYTHON" -m pytest "${workers[@]}" tests -k "gpu or test_kernels or test_backends" --junitxml="$left/tests.xml"
            ;;
        kernels)
            # Dumped after each case, so that what was measured survives the time limit.
            run_part kernels 270 "$left/kernels.json" \
                env PPCL_BENCH_JSON="$left/kernels.json" PPCL_BENCH_SECONDS="${PPCL_BENCH_SECONDS:-230}" \
                "$PYTHON" -m pytest bench/bench_kernels.py --benchmark-only -s
            ;;
        model)
            run_part model 120 "$left/model.json" \
                "$PYTHON" -m pytest bench/bench_model.py --benchmark-only --benchmark-json="$left/model.json" -s
            ;;
    esac
done
exit $failed
