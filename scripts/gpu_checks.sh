#!/usr/bin/env bash
# What only a CUDA machine can show, in under eight minutes, without a network:
#   scripts/gpu_checks.sh [OUT]        (OUT: folder for the JSON, default benchmarks/)
# Needs Python with this package's dependencies (`pip install -e '.[dev]'`), or at least torch, timm and hydra importable.
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-benchmarks}"
python="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}"
"$python" -c 'import torch, sys; sys.exit(None if torch.cuda.is_available() else "gpu_checks: this machine has no CUDA device")'
mkdir -p "$out"
status=0
"$python" -m pytest -m gpu -q || status=$?
"$python" scripts/gpu_checks.py --out "$out" || status=$?
exit "$status"
