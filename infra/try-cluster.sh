#!/usr/bin/env bash
# Run all jobs on a Ray cluster of several machines, which are Linux namespaces on this machine. Needs root; takes minutes.
#   sudo bash infra/try-cluster.sh [--jobs JOB...] [--faults FAULT...] [--quick]
# The machines share only an S3 server and an MLflow server. During each job, a worker machine is switched off, MLflow and
# PostgreSQL are killed, and the S3 server is paused; the results are compared with those of undisturbed jobs on one machine.
# PYTHON: interpreter with the packages (default: .venv/bin/python).
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-.venv/bin/python}" -m tests.infra.cluster "$@"
