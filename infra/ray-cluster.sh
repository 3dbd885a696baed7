#!/usr/bin/env bash
# Start a small Ray cluster by hand. Every machine needs this project at the same path, with its environment (`make .venv/up-to-date`).
#   on the first machine:     infra/ray-cluster.sh head
#   on each other machine:    infra/ray-cluster.sh worker FIRST_MACHINE:6379
#   to stop, on each machine: infra/ray-cluster.sh stop
set -euo pipefail
cd "$(dirname "$0")/.."
ray=.venv/bin/ray
export RAY_USAGE_STATS_ENABLED=0 PYTHONPATH=$PWD  # for imports in Ray's workers

case "${1:-}" in
    head) "$ray" start --head --port=6379 --dashboard-host=127.0.0.1 --disable-usage-stats ;;
    worker) "$ray" start --address="${2:?missing address; give the one that \`head\` printed, such as 10.0.0.1:6379}" ;;
    stop) "$ray" stop ;;
    *)
        sed -n '2,5s/^# //p' "$0" >&2
        exit 2
        ;;
esac
