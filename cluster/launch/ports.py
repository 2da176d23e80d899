"""Choosing free TCP ports, and saying early that one is taken."""

from __future__ import annotations

import socket

from cluster.errors import StartupError
from cluster.listening import family_of, reason_of, why_not_listening


def choose_free_port(host: str) -> int:
    """A port on `host` that nothing listens on.

    A connection is opened and closed on it, so that it rests in TIME_WAIT: for a minute the kernel gives
    it to nobody who asks for any port, while a server that asks for this one (with SO_REUSEADDR) gets it.
    """
    try:
        with socket.create_server((host, 0), family=family_of(host)) as server:
            address = server.getsockname()
            with socket.socket(family_of(host), socket.SOCK_STREAM) as client:
                client.settimeout(5.0)
                client.connect(address)
                server.accept()[0].close()
            return int(address[1])
    except OSError as error:
        raise StartupError(
            f"no port can be opened on {host} ({reason_of(error)}): is it an address of this machine? It is `--host`, "
            "or router.host, prefill.host or decode.host"
        ) from error


def check_port_free(host: str, port: int, key: str) -> None:
    """Raise `StartupError` naming the config `key` when `port` cannot be listened on."""
    try:
        with socket.create_server((host, port), family=family_of(host)):
            return
    except OSError as error:
        raise StartupError(f"{key}: {why_not_listening(error, host, port, key)}") from error
