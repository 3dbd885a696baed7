#!/usr/bin/env bash
# Back up the MLflow server every BACKUP_HOURS hours, and delete backups older than BACKUP_DAYS days.
#   backup.sh          runs until it is stopped
#   backup.sh once     one backup
# The database comes first: an artifact that is newer than the dump does no harm, a missing one does.
set -euo pipefail
target=${BACKUP_FOLDER:-/backups}
artifacts=${ARTIFACTS_FOLDER:-/artifacts}

backup() {
    local name part
    name=$(date --utc +%Y%m%dT%H%M%SZ)
    part=$target/.part-$name
    mkdir -p "$part"
    pg_dump --format=custom --file="$part/mlflow.dump"
    # The S3 server stores the metadata of objects in extended attributes. Exit status 1: a file changed while it was read.
    tar --create --xattrs --file="$part/artifacts.tar" --directory="$artifacts" . || [[ $? -eq 1 ]]
    mv "$part" "$target/$name" # a backup without the prefix .part- is complete
    find "$target" -mindepth 1 -maxdepth 1 -mtime "+${BACKUP_DAYS:-14}" -exec rm -r {} +
    echo "$target/$name: complete"
}

if [[ ${1:-} == once ]]; then
    backup
    exit
fi
trap exit TERM INT # as the first process of a container, bash ignores them by default
while true; do
    # One failed backup, such as during a restart of the database, must not end the service.
    bash "$0" once || echo "backup failed; the next attempt is in ${BACKUP_HOURS:-24} hours" >&2
    sleep "$((${BACKUP_HOURS:-24} * 3600))" &
    wait $!
done
