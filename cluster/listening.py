"""What everyone who listens on a port says, and needs of a socket."""

from __future__ import annotations

import errno
import os
import socket

from cluster.addresses import join_address


def family_of(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def why_not_listening(error: OSError, host: str, port: int, key: str) -> str:
    """A sentence with the way out; `key` is where the port is configured."""
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {port} on {host} is already taken; stop the process that uses it or choose another port "
            f"({key}, 0 chooses a free one)"
        )
    return f"cannot listen on {join_address(host, port)}: {reason_of(error)}"


def reason_of(error: OSError) -> str:
    """Without what asyncio and socket add to it. Errors of name resolution have numbers of their own."""
    if error.errno is None or isinstance(error, socket.gaierror):
        return error.strerror or str(error)
    return os.strerror(error.errno)
