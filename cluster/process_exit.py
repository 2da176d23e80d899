"""The end of a process that has loaded NIXL."""

from __future__ import annotations

import logging
import os
import sys
from typing import NoReturn


def leave(exit_code: int) -> NoReturn:
    """End now, with what was written so far, without the destructors of loaded libraries.

    UCX's wheel brings its own libnl; on a machine that has libibverbs, and so another libnl, the two meet in
    their destructors, and a worker that had done everything right ended with SIGSEGV. Everything this process
    owns has been closed before this is called; the rest is the kernel's.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
