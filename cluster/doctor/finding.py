"""One line of the doctor's report."""

from __future__ import annotations

from enum import Enum

import msgspec


class Status(str, Enum):
    OK = "ok"
    LIMITED = "limited"  # works, but slower or with less than possible
    BROKEN = "broken"  # serving needs it


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """`fix` says what to do when the status is not OK."""

    name: str
    status: Status
    detail: str
    fix: str = ""


def ok(name: str, detail: str) -> Finding:
    return Finding(name=name, status=Status.OK, detail=detail)


def limited(name: str, detail: str, fix: str) -> Finding:
    return Finding(name=name, status=Status.LIMITED, detail=detail, fix=fix)


def broken(name: str, detail: str, fix: str) -> Finding:
    return Finding(name=name, status=Status.BROKEN, detail=detail, fix=fix)
