#!/bin/sh
# Writes constraints.txt: the exact version of everything that a clean environment gets from pyproject.toml today.
# Run it on a machine without an NVIDIA GPU, where pip finds the CPU build of torch; then run ./check.
set -eu
cd "$(dirname "$0")/.."
clean=$(mktemp -d)
trap 'rm -rf "$clean"' EXIT
"${PYTHON:-python3}" -m venv "$clean/venv"
"$clean/venv/bin/python" -m pip install -qq --upgrade pip
"$clean/venv/bin/python" -m pip install -qq -e '.[plot,serve,test,lint,ci]'
"$clean/venv/bin/python" -m pip check
{
    echo "# Written by scripts/lock.sh in a clean environment: $("$clean/venv/bin/python" --version), CPU build of torch."
    "$clean/venv/bin/python" -m pip freeze --all --exclude-editable --exclude setuptools | sed 's/+cpu$//'
} >"$clean/constraints.txt"
if grep -Eq '^(nvidia|cuda|triton)|@|\+' "$clean/constraints.txt"; then
    echo "A CUDA build, a local version or an address came along; constraints.txt is left as it was:" >&2
    grep -E '^(nvidia|cuda|triton)|@|\+' "$clean/constraints.txt" >&2
    exit 3
fi
mv "$clean/constraints.txt" constraints.txt
