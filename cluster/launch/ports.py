"""Choosing free TCP ports, and saying early that one is taken."""

from __future__ import annotations

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
        raise StartupError(f"no port can be opened on {host}: {error.strerror or error}") from error


def check_port_free(host: str, port: int, key: str) -> None:
    """Raise `StartupError` naming the config `key` when `port` cannot be listened on."""
    try:
        with socket.create_server((host, port), family=_family(host)):
            return
    except OSError as error:
        raise StartupError(f"{key}: cannot listen on {host} port {port}: {error.strerror or error}") from error


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
