#!/bin/sh
# Runs scripts/gpu_check.py on a machine with an NVIDIA GPU: at most eight minutes, of which installing takes two at most.
#
#   scripts/gpu-check.sh                  correctness, the table of speeds, training; writes docs/gpu.md
#   scripts/gpu-check.sh --interpreter    the same path on the CPU, by Triton's interpreter at tiny sizes; writes nothing
#
# PYTHON names the interpreter; it has torch already, as images for GPUs do. What else is missing is installed where a
# registry answers, and otherwise named in what the check prints.
set -u
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ ! -x .venv/bin/python ] || PYTHON=.venv/bin/python
fi
"$PYTHON" -c 'import torch' 2>/dev/null || {
    echo "gpu-check: $PYTHON has no torch. Name one that has: PYTHON=/path/to/python $0" >&2
    exit 3
}
case " $* " in
*" --interpreter "*) export TRITON_INTERPRET=1 ;;
*)
    missing=$("$PYTHON" scripts/gpu_check.py --missing)
    # Without torch, which is there: a build of another kind would take its place.
    [ -z "$missing" ] || timeout 120 "$PYTHON" -m pip install -q --no-input --no-deps $missing ||
        echo "gpu-check: not installed: $missing" >&2
    ;;
esac
PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" exec "$PYTHON" scripts/gpu_check.py "$@"
