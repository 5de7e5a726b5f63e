#!/usr/bin/env bash
# Ranks on this machine:   launchers/local.sh parallel.pp=2 parallel.dp=2
set -euo pipefail

exec dist-mtp train launcher=local "$@"
