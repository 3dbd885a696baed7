#!/usr/bin/env bash
# An MLflow server for several machines: SQLite and artifacts in FOLDER, at http://THIS_MACHINE:PORT.
#   infra/mlflow-server.sh [FOLDER] [PORT]
# MLflow accepts requests only for localhost, private addresses, and the hosts in MLFLOW_SERVER_ALLOWED_HOSTS.
set -euo pipefail
folder=$(realpath -m "${1:-tcan-mlflow-server}")
port=${2:-5000}
mkdir -p "$folder"
export MLFLOW_DISABLE_TELEMETRY=true
# The server stores the artifacts, so the machines need no shared folder.
exec "$(dirname "$0")/../.venv/bin/mlflow" server --host 0.0.0.0 --port "$port" --workers 2 \
    --backend-store-uri "sqlite:///$folder/mlflow.db" --artifacts-destination "$folder/artifacts"
