"""What infra/mlflow/without-containers.sh requires: PostgreSQL, and packages that are not in the lock file of this project."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

INFRA = Path(__file__).parents[2] / "infra" / "mlflow"
SCRIPT = INFRA / "without-containers.sh"
UV = Path(sys.prefix) / "uv" / "bin" / "uv"
POSTGRES = [*Path("/usr/lib/postgresql").glob("*/bin/postgres"), shutil.which("postgres")]
# In requirements.lock of the server, but not in that of this project.
SERVER_PACKAGES = ("flask-wtf", "psycopg", "psycopg-binary", "wtforms")


def missing_program() -> str | None:
    """Why the server cannot be started here; None if it can."""
    if not any(POSTGRES):
        return "requires PostgreSQL (Debian package postgresql)"
    return None if UV.exists() else "requires uv, which `make install` installs"


def install_server_packages(folder: Path) -> None:
    """Install the packages of the server into `folder`/packages, for PYTHONPATH.

    Raises:
        RuntimeError: they cannot be installed, e.g. without access to a package index.
    """
    lock = (INFRA / "requirements.lock").read_text()
    entries = [re.search(rf"^{name}==(.|\n)*?(?=^\S)", lock, re.MULTILINE) for name in SERVER_PACKAGES]
    (folder / "some.lock").write_text("".join(entry[0] for entry in entries if entry))
    command = [UV, "pip", "install", "--python", sys.executable, "--target", folder / "packages", "--no-deps"]
    result = subprocess.run(
        [*command, "--require-hashes", "-r", folder / "some.lock"], capture_output=True, text=True
    )
    if result.returncode:
        raise RuntimeError(f"the packages of the MLflow server cannot be installed: {result.stderr[-300:]}")
