"""Check of a port before a server starts."""

import errno
import socket

from tcan.errors import UserError


def check_port(host: str, port: int) -> None:
    """Check that a server can listen at this address.

    Raises:
        UserError: an invalid port, one in use, or a host that is not this machine.
    """
    if not 1 <= port <= 65535:
        raise UserError(f"--port {port}: must be from 1 to 65535; set e.g. 5000")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                raise UserError(
                    f"--host {host}: not an address of this machine; set 127.0.0.1, or 0.0.0.0 for all of its addresses"
                ) from None
            if error.errno != errno.EADDRINUSE:
                raise UserError(
                    f"port {port} is not available ({error.strerror}); set another one with --port"
                ) from None
            raise UserError(f"port {port} is in use; set another one with --port") from None
