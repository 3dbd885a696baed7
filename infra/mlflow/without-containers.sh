#!/usr/bin/env bash
# The services of compose.yaml without containers: PostgreSQL and MLflow with basic authentication, until the script is stopped.
#   infra/mlflow/without-containers.sh FOLDER [PORT]
# FOLDER has the database. Root starts PostgreSQL as the user `postgres`, who must be able to enter FOLDER.
# The artifacts are in an S3-compatible store: set MLFLOW_S3_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.
# Passwords: POSTGRES_PASSWORD, MLFLOW_ADMIN_PASSWORD and MLFLOW_FLASK_SERVER_SECRET_KEY, as in example.env.
# PYTHON: interpreter with the packages of requirements.lock (default: python). PGPORT: port of PostgreSQL (default: 5433).
set -euo pipefail
fail() {
    echo "$0: $1" >&2
    exit 2
}
here=$(cd "$(dirname "$0")" && pwd)
folder=$(realpath -m "${1:?FOLDER is missing}")
port=${2:-5000}
python=${PYTHON:-python}
export PGPORT=${PGPORT:-5433} PGHOST=127.0.0.1 PGUSER=mlflow
for name in MLFLOW_S3_ENDPOINT_URL AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY POSTGRES_PASSWORD MLFLOW_ADMIN_PASSWORD \
    MLFLOW_FLASK_SERVER_SECRET_KEY; do
    [[ -n ${!name:-} ]] || fail "$name: not set; see example.env"
done
export PGPASSWORD=$POSTGRES_PASSWORD
binaries=$(for file in /usr/lib/postgresql/*/bin/postgres "$(command -v postgres)"; do
    [[ -x $file ]] && dirname "$(realpath "$file")"
done | tail -1) || true
[[ -n $binaries ]] || fail "PostgreSQL is missing; install it, e.g. the Debian package postgresql"

as_postgres=()
mkdir -p "$folder/postgres"
if [[ $(id -u) == 0 ]]; then # PostgreSQL refuses to run as root
    as_postgres=(runuser -u postgres --)
    chown postgres "$folder/postgres"
    "${as_postgres[@]}" test -x "$folder/postgres" || fail "$folder: the user postgres cannot enter it; choose another folder"
fi
data=$folder/postgres/data
cd "$folder/postgres"
if [[ ! -f $data/PG_VERSION ]]; then
    "${as_postgres[@]}" bash -c 'umask 077 && cat >password' <<<"$POSTGRES_PASSWORD"
    "${as_postgres[@]}" "$binaries/initdb" --pgdata="$data" --username=mlflow --pwfile=password --auth=scram-sha-256 \
        --encoding=UTF8 --no-locale >initdb.log || fail "initdb failed; see $folder/postgres/initdb.log"
    rm password
fi
server=
stop() {
    if [[ -n $server ]]; then
        kill -TERM -- "-$server" 2>/dev/null || true
        wait "$server" || true
    fi
    "${as_postgres[@]}" "$binaries/pg_ctl" stop --pgdata="$data" --mode=fast --silent
}
trap 'stop; exit 0' TERM INT
"${as_postgres[@]}" "$binaries/pg_ctl" start --pgdata="$data" --log=postgres.log --wait --silent \
    --options="-p $PGPORT -c listen_addresses=$PGHOST -c unix_socket_directories=" ||
    fail "PostgreSQL does not start; see $folder/postgres/postgres.log"
[[ $("$binaries/psql" -d postgres -tAc "SELECT 1 FROM pg_database WHERE datname = 'mlflow'") == 1 ]] ||
    "$binaries/createdb" mlflow

"$python" "$here/create_bucket.py" mlflow
sed "s/@postgres:5432/@$PGHOST:$PGPORT/" "$here/auth.ini" >"$folder/auth.ini"
export MLFLOW_AUTH_CONFIG_PATH=$folder/auth.ini MLFLOW_DISABLE_TELEMETRY=true
export MLFLOW_AUTH_ADMIN_USERNAME=${MLFLOW_ADMIN_USERNAME:-admin} MLFLOW_AUTH_ADMIN_PASSWORD=$MLFLOW_ADMIN_PASSWORD
set -m # a process group of its own, which `stop` ends
"$python" -m mlflow server --host "${MLFLOW_BIND:-127.0.0.1}" --port "$port" --workers "${WORKERS:-2}" --app-name basic-auth \
    --backend-store-uri "postgresql://$PGUSER@$PGHOST:$PGPORT/mlflow" --artifacts-destination s3://mlflow/artifacts &
server=$!
status=0
wait "$server" || status=$?
server=
stop
exit "$status"
