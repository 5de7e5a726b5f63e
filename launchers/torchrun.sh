#!/usr/bin/env bash
# One node or several. Run it once on every node with the same arguments:
#   NNODES=2 MASTER_ADDR=node0 launchers/torchrun.sh model=deepseek_v2_lite parallel.pp=2 run.name=v2
# or once, on any machine, for hosts that ssh reaches without a password:
#   HOSTS=node0,node1 launchers/torchrun.sh model=deepseek_v2_lite parallel.pp=2 run.name=v2
# NNODES: nodes (default 1).            NODE_RANK: this node's number; without it the node of MASTER_ADDR is 0.
# MASTER_ADDR, MASTER_PORT: where the nodes meet (port 29500 by default).   NPROC: ranks per node (default 8).
# run.dir and the corpus must lie in folders that all nodes share.
set -euo pipefail

arguments=(launcher=torchrun "launcher.ranks_per_node=${NPROC:-8}")
if [[ -n "${HOSTS:-}" ]]; then
    arguments+=("launcher.hosts=[$HOSTS]")
else
    if [[ "${NNODES:-1}" != 1 && -z "${MASTER_ADDR:-}" ]]; then
        echo "error: NNODES=$NNODES needs MASTER_ADDR, a name of the first node that all nodes know" >&2
        exit 2
    fi
    arguments+=("launcher.nodes=${NNODES:-1}" "launcher.rendezvous=${MASTER_ADDR:-127.0.0.1}:${MASTER_PORT:-29500}")
fi
if [[ -n "${NODE_RANK:-}" ]]; then
    arguments+=("launcher.node_rank=$NODE_RANK")
fi

exec dist-mtp train "${arguments[@]}" "$@"
