"""Which kernels this machine has admitted (docs/numerics.md)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from cluster.doctor.finding import Finding, broken, limited, ok
from cluster.errors import ConfigError

NAME = "Kernels"
FIX = "install a C++ compiler (g++) and run `make install` again; until then answers are right, but very slow"


class Verdict(Protocol):
    """As `cluster.engine.kernels.Admission`, which takes torch to import."""

    @property
    def operation(self) -> str: ...

    @property
    def candidate(self) -> str: ...

    @property
    def admitted(self) -> bool: ...

    @property
    def detail(self) -> str: ...


def admitted() -> Iterator[Finding]:
    """The first time on a machine this compares every kernel with its reference, which takes seconds."""
    try:
        from cluster.engine.kernels import fingerprint, get_ops, kernel_report

        verdicts = kernel_report("cpu")
        ops = get_ops("cpu")
        yield ok("Instruction class", f"{ops.name}, numeric fingerprint {fingerprint(ops)}")
    except (ImportError, OSError) as error:
        yield broken(NAME, f"the engine cannot be imported: {error}", "run `make install` again")
        return
    except ConfigError as error:
        yield broken(NAME, error.message, "correct or unset the environment variable")
        return
    yield judge(verdicts)
    for verdict in verdicts:
        if not verdict.admitted:
            yield ok("Refused kernel", f"{verdict.operation} by {verdict.candidate}: {verdict.detail}")


def judge(verdicts: Sequence[Verdict]) -> Finding:
    """An operation without an admitted kernel runs on its reference."""
    operations = dict.fromkeys(verdict.operation for verdict in verdicts)
    serving = {verdict.operation: verdict.candidate for verdict in reversed(verdicts) if verdict.admitted}
    slow = [operation for operation in operations if operation not in serving]
    if slow or not operations:
        return limited(NAME, f"slow reference for {', '.join(slow) or 'everything'}", FIX)
    return ok(NAME, ", ".join(f"{operation} {serving[operation]}" for operation in operations))
