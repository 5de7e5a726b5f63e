#!/usr/bin/env bash
# One node or several; run it once on every node with the same arguments.
#   NNODES=2 MASTER_ADDR=node0 launchers/torchrun.sh model=deepseek_v2_lite parallel.pp=8 run.name=v2
# NNODES: nodes (default 1).            NODE_RANK: this node's number, needed only to fix the order of ranks.
# MASTER_ADDR, MASTER_PORT: where the nodes meet (default 127.0.0.1:29500).   NPROC: ranks per node (default 8).
# run.dir must be a folder that all nodes share.
set -euo pipefail

arguments=(
    --nnodes "${NNODES:-1}"
    --nproc-per-node "${NPROC:-8}"
)
if [[ -n "${NODE_RANK:-}" ]]; then
    # Static rendezvous: node k holds ranks k * NPROC and up.
    arguments+=(--node-rank "$NODE_RANK" --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}")
else
    arguments+=(--rdzv-backend c10d --rdzv-id "${RDZV_ID:-dist-mtp}")
    arguments+=(--rdzv-endpoint "${MASTER_ADDR:-127.0.0.1}:${MASTER_PORT:-29500}")
fi

exec torchrun "${arguments[@]}" -m dist_mtp.train "$@"
