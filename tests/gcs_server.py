"""A local server of Google Cloud Storage, with the request handlers of gcp-storage-emulator: python -m tests.gcs_server BUCKET.

It prints its address and runs until it is killed. It needs a process of its own: Arrow holds the interpreter lock while it
opens a Parquet file, so that a server in the same process could not answer.
"""

import io
import json
import re
import sys
import threading
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from gcp_storage_emulator.handlers.buckets import create_bucket
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

READ_ONLY = "read-only"
"""Name of a second bucket, with the permissions of the role "Storage Object Viewer". The emulator has no permissions."""
# Requests that this role does not allow: the properties of the bucket, and uploads.
FORBIDDEN = re.compile(rf"GET /storage/v1/b/{READ_ONLY}[? ]|(?!GET )\w+ .*/b/{READ_ONLY}/")


class _Handler(RequestHandler):
    """Handles one request at a time, because the store is not safe for threads, but sends the responses concurrently.

    The server of the emulator also sends one response at a time. Arrow starts the download of a file when it opens it, and
    reads parts of it in further requests; these would wait for the end of the download, which nobody reads.
    """

    _handling = threading.Lock()

    def handle_one_request(self) -> None:
        if not self.rfile.peek(1):
            self.close_connection = True
            return
        connection, self.wfile = self.wfile, io.BytesIO()
        with self._handling:
            super().handle_one_request()
        connection.write(self.wfile.getvalue())
        self.wfile = connection

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        if FORBIDDEN.match(self.requestline):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_error(403)
            return False
        return True


def write_credentials(path: Path) -> None:
    """Write the key file of a service account. Clients sign their tokens with it; the server does not check them."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    account = {
        "type": "service_account",
        "project_id": "test",
        "private_key_id": "1",
        "private_key": pem.decode(),
        "client_email": "test@test.iam.gserviceaccount.com",
        "client_id": "1",
        "token_uri": "http://127.0.0.1:1/token",
    }
    path.write_text(json.dumps(account))


def main(bucket: str) -> None:
    storage = Storage(use_memory_fs=True)
    create_bucket(bucket, storage)
    create_bucket(READ_ONLY, storage)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, storage)) as server:
        print(f"http://127.0.0.1:{server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1])
