#!/usr/bin/env bash
# A small Ray cluster by hand. Every machine has this project at the same path, its environment made (`make .venv/up-to-date`).
#   on the first machine:  infra/ray-cluster.sh head
#   on each other one:     infra/ray-cluster.sh worker FIRST_MACHINE:6379
#   to end it, on each:    infra/ray-cluster.sh stop
set -euo pipefail
cd "$(dirname "$0")/.."
ray=.venv/bin/ray
export RAY_USAGE_STATS_ENABLED=0 PYTHONPATH=$PWD  # jobs find the packages wherever Ray runs them

case "${1:-}" in
    head) "$ray" start --head --port=6379 --dashboard-host=127.0.0.1 --disable-usage-stats ;;
    worker) "$ray" start --address="${2:?the address that \`head\` printed, such as 10.0.0.1:6379}" ;;
    stop) "$ray" stop ;;
    *)
        sed -n '2,5s/^# //p' "$0" >&2
        exit 2
        ;;
esac
