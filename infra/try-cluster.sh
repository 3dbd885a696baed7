#!/usr/bin/env bash
# Run all jobs on a Ray cluster of several machines, which are Linux namespaces on this machine. Needs root; takes minutes.
#   sudo bash infra/try-cluster.sh [--quick] [--faults NAME...]
# The machines share only an S3 server and an MLflow server. During the jobs, worker machines are switched off, the MLflow
# server is killed and the S3 server is paused; the losses are compared with an undisturbed training on one machine.
# PYTHON: interpreter with the packages (default: .venv/bin/python).
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-.venv/bin/python}" -m tests.infra.cluster "$@"
