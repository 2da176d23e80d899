"""How the life of one rank ended."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ConfigError, TandemError

ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"

Show = Callable[[TandemError], None]  # to the user, at once: a launcher ends all ranks when the first one ends


@dataclass(frozen=True, slots=True)
class Outcome:
    """`why` the job failed, which the user has been shown; empty after a clean stop."""

    why: str = ""
    exit_code: int = 0


def failed(error: TandemError) -> Outcome:
    return Outcome(error.message, exit_code=2 if isinstance(error, ConfigError) else 1)


def tell_torchrun(outcome: Outcome, environment: Mapping[str, str]) -> None:
    """torchrun shows the `message` in this file of a rank that failed; other launchers have no such thing."""
    path = environment.get(ERROR_FILE_VARIABLE)
    if not path or not outcome.why:
        return
    report = {"message": {"message": outcome.why, "extraInfo": {"timestamp": str(int(time.time()))}}}
    try:
        Path(path).write_text(json.dumps(report))
    except OSError:  # its directory is gone, and so is torchrun
        return
