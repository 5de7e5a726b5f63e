#!/usr/bin/env bash
# DeepSpeed's launcher on this machine, or on the nodes of a hostfile.
#   launchers/deepspeed.sh parallel.pp=2
# NPROC: ranks per node (default 2).    HOSTFILE: "host slots=8" lines for several nodes (needs passwordless ssh).
set -euo pipefail

# Unlike torchrun, deepspeed leaves every CPU rank as many threads as there are cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

arguments=()
if [[ -n "${HOSTFILE:-}" ]]; then
    arguments+=(--hostfile "$HOSTFILE")
else
    arguments+=(--num_accelerators "${NPROC:-2}")
fi

exec deepspeed "${arguments[@]}" --module dist_mtp.train "$@"
