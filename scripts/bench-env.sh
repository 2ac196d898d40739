#!/bin/sh
# The benchmark's own environment: the public packages that memories are compared with, beside the same torch.
set -eu
cd "$(dirname "$0")/.."
python3 -m venv .bench-venv
torch=$(grep '^torch==' constraints.txt)
.bench-venv/bin/pip install -q "$torch"
.bench-venv/bin/pip install -q "$torch" 'titans-pytorch==0.5.*' transformers
.bench-venv/bin/python -c 'import titans_pytorch, transformers; print("ready: meristem bench memory compares with it")'
