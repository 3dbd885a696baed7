#!/usr/bin/env bash
# Start tonight's RayJob. A run that is still active is stopped first; the new one resumes its work, because two jobs must not write to
# one dataset.
set -euo pipefail
here=$(dirname "$0")
kubectl get rayjob tcan-preprocess-template --output json | jq --from-file "$here/rayjob.jq" > /tmp/rayjob.json
kubectl delete rayjob tcan-preprocess-nightly --ignore-not-found --cascade=foreground --timeout=10m
kubectl create --filename /tmp/rayjob.json
