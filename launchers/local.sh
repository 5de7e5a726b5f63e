#!/usr/bin/env bash
# Ranks on this machine:   launchers/local.sh parallel.pp=2
# NPROC: ranks (default 2; on GPUs at most one per device).
set -euo pipefail

exec torchrun --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 --local-addr 127.0.0.1 \
    --nproc-per-node "${NPROC:-2}" -m dist_mtp.train "$@"
