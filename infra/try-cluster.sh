#!/usr/bin/env bash
# Try all jobs on a Ray cluster of several machines, which are Linux namespaces on this machine. Needs root; takes minutes.
#   sudo bash infra/try-cluster.sh
# The machines share only an S3 server and an MLflow server. A worker machine is switched off during the training; the losses
# are compared with an undisturbed training. PYTHON: interpreter with the packages (default: .venv/bin/python).
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-.venv/bin/python}" -m tests.infra.cluster "$@"
