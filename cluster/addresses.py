"""Hosts and ports, for sockets, gRPC and URLs alike."""

from __future__ import annotations

import ipaddress

WILDCARDS = ("0.0.0.0", "::")  # listening there, a process is reached at every address of its machine


def join_address(host: str, port: int) -> str:
    """`host:port`, with the brackets that an IPv6 address needs there (and may have already)."""
    is_bare_ipv6 = ":" in host and not host.startswith("[")
    return f"[{host}]:{port}" if is_bare_ipv6 else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Only processes of this machine reach it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
