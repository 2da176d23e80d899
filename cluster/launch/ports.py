"""Choosing free TCP ports, and saying early that one is taken."""

from __future__ import annotations

import errno
import os
import socket

from cluster.errors import StartupError


def choose_free_port(host: str) -> int:
    """A port on `host` that nothing listens on.

    A connection is opened and closed on it, so that it rests in TIME_WAIT: for a minute the kernel gives
    it to nobody who asks for any port, while a server that asks for this one (with SO_REUSEADDR) gets it.
    """
    try:
        with socket.create_server((host, 0), family=_family(host)) as server:
            address = server.getsockname()
            with socket.socket(_family(host), socket.SOCK_STREAM) as client:
                client.settimeout(5.0)
                client.connect(address)
                server.accept()[0].close()
            return int(address[1])
    except OSError as error:
        raise StartupError(
            f"no port can be opened on {host} ({_reason(error)}): is it an address of this machine? It is `--host`, or "
            "router.host, prefill.host or decode.host"
        ) from error


def check_port_free(host: str, port: int, key: str) -> None:
    """Raise `StartupError` naming the config `key` when `port` cannot be listened on."""
    try:
        with socket.create_server((host, port), family=_family(host)):
            return
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise StartupError(
                f"{key}: port {port} on {host} is already taken; stop the process that uses it or choose another port "
                "(0 chooses a free one)"
            ) from error
        raise StartupError(f"{key}: cannot listen on {host} port {port}: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    """Without what asyncio and socket add to it. Errors of name resolution have numbers of their own."""
    if error.errno is None or isinstance(error, socket.gaierror):
        return error.strerror or str(error)
    return os.strerror(error.errno)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
