#!/usr/bin/env bash
# What only a GPU can tell, in nine minutes: see gpu_check.py. Needs torch 2.11 or later.
#   bash experiments/gpu_check.sh                             OUT=FOLDER for the results
#   bash experiments/gpu_check.sh --device cpu --size tiny    to try it out
cd "$(dirname "$0")/.." || exit
exec "${PYTHON:-python3}" -m experiments.gpu_check --out "${OUT:-out/gpu_check}" "$@"
