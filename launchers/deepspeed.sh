#!/usr/bin/env bash
# DeepSpeed's launcher on this machine, or on the nodes of a hostfile.
#   launchers/deepspeed.sh parallel.pp=2
#   HOSTFILE=hosts launchers/deepspeed.sh model=deepseek_v2_lite parallel.pp=2 run.name=v2
# NPROC: ranks per node (default: slots of the hostfile, else parallel.pp).
# HOSTFILE: "host slots=8" lines for several nodes, which pdsh must reach by ssh without a password.
set -euo pipefail

arguments=(launcher=deepspeed)
if [[ -n "${NPROC:-}" ]]; then
    arguments+=("launcher.ranks_per_node=$NPROC")
fi
if [[ -n "${HOSTFILE:-}" ]]; then
    arguments+=("launcher.hostfile=$HOSTFILE")
fi

exec dist-mtp train "${arguments[@]}" "$@"
