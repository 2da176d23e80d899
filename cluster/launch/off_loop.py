"""Calls that may never return, kept away from the event loop and from the end of the process."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


async def off_loop(function: Callable[..., Result], *arguments: object) -> Result:
    """Run it in a daemon thread: one that never returns holds up neither the loop nor the end of the process."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Result] = loop.create_future()

    def settle(work: concurrent.futures.Future[Result]) -> None:
        if future.done():  # cancelled
            return
        if (error := work.exception()) is not None:
            future.set_exception(error)
        else:
            future.set_result(work.result())

    def run() -> None:
        work: concurrent.futures.Future[Result] = concurrent.futures.Future()
        try:
            work.set_result(function(*arguments))
        except Exception as error:  # noqa: BLE001  the caller's to handle
            work.set_exception(error)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(settle, work)

    threading.Thread(target=run, daemon=True).start()
    return await future
