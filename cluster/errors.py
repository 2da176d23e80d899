"""The error tree. Anything a user can cause or must act on is one of these; invariants are asserts.

TandemError
|-- InvalidRequest            the client's request is wrong                          HTTP 400
|   |-- ContextTooLong        prompt (+ max_tokens) does not fit; names both numbers      400
|   |-- UnknownModel          no such model is served                                     404
|   `-- BodyTooLarge          request body over the limit                                 413
|-- Overloaded                no capacity now; has `retry_after_s`                        503
|-- DeadlineExceeded          the request's deadline passed                               504
|-- Cancelled                 the client went away, or an operator aborted it             499
|-- WorkerLost                a worker died or its stream broke                           502
|-- NumericalError            NaN in the logits of one request                            500
|-- HandoverError             KV could not be handed over                                 502
|   |-- HandshakeMismatch     P and D differ; `fields` lists each with both values        503
|   |-- TicketInvalid         forged, replayed or foreign handle
|   |-- LeaseExpired          the blocks are gone or were reused (generation changed)
|   |-- DigestMismatch        what arrived is not what was computed
|   `-- TransferFailed        the transport said no
|-- ConfigError               a config file, flag or environment value is wrong
|-- ModelError                a model cannot be loaded (missing tensor, truncated file, ...)
`-- StartupError              a worker could not start (port taken, no memory, ...)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar


class TandemError(Exception):
    """Base of all errors this project raises on purpose. `message` is written for the user."""

    http_status: ClassVar[int] = 500
    code: ClassVar[str] = "tandem_error"  # the class name in snake case; stable, goes on the wire

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.code = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidRequest(TandemError):
    http_status = 400

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextTooLong(InvalidRequest):
    pass


class UnknownModel(InvalidRequest):
    http_status = 404


class BodyTooLarge(InvalidRequest):
    http_status = 413


class Overloaded(TandemError):
    http_status = 503

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(TandemError):
    http_status = 504


class Cancelled(TandemError):
    http_status = 499


class WorkerLost(TandemError):
    http_status = 502


class NumericalError(TandemError):
    http_status = 500


class HandoverError(TandemError):
    http_status = 502


class HandshakeMismatch(HandoverError):
    http_status = 503

    def __init__(self, fields: Mapping[str, tuple[str, str]]) -> None:
        self.fields = dict(fields)
        listed = ", ".join(f"{name} (ours {ours}, theirs {theirs})" for name, (ours, theirs) in self.fields.items())
        super().__init__(f"prefill and decode worker cannot be paired, they differ in: {listed}")


class TicketInvalid(HandoverError):
    pass


class LeaseExpired(HandoverError):
    pass


class DigestMismatch(HandoverError):
    pass


class TransferFailed(HandoverError):
    pass


class ConfigError(TandemError):
    pass


class ModelError(TandemError):
    pass


class StartupError(TandemError):
    pass


def error_class_of(code: str) -> type[TandemError]:
    """The class a wire code names; `TandemError` for a code this version does not know."""
    pending: list[type[TandemError]] = [TandemError]
    while pending:
        cls = pending.pop()
        if cls.code == code:
            return cls
        pending.extend(cls.__subclasses__())
    return TandemError
