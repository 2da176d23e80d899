"""An actor as the launcher sees it. Ray's errors end here: what is gone is `RankLost`; every wait is bounded."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
from collections.abc import AsyncIterator
from typing import Any

from cluster.errors import StartupError
from cluster.launch.off_loop import off_loop
from cluster.launch.ray_messages import Batch, Place, batch_decoder, place_decoder
from cluster.launch.silence import Silence, within

CALL_TIMEOUT_S = 30.0
NEWS_TIMEOUT_S = 15.0  # three times what the actor takes to say that there are none
ACTOR_START_TIMEOUT_S = 120.0  # its process is started and imports this package
CLOSE_TIMEOUT_S = 5.0
SILENCE_S = 30.0  # an actor that cannot be asked for so long counts as dead
RETRY_PAUSE_S = 0.5
MAX_REASON = 300  # characters of what Ray says about a death
TELLING = ("The actor is dead because", "The actor died because")
RAISED = "an error raised in its creation task"  # a traceback follows
NOT_INSTALLED = "No module named"
GUESSES = " Some common causes"  # of Ray; what follows is not about this death


class RankLost(Exception):
    """An actor is gone; the text says why."""


class RankHandle:
    """Made by `Placement.start_actor`."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self._errors = ray.exceptions
        self._ray = ray
        self._actor = actor

    async def place(self, timeout_s: float = CALL_TIMEOUT_S) -> Place:
        """Where it is. Raises `RankLost`, and `StartupError` if another version of Tandem is there."""
        place = place_decoder.decode(await self.call("place", timeout_s=timeout_s))
        ours = importlib.metadata.version("tandem-serving")
        if place.version != ours:
            raise StartupError(
                f"node {place.host} has Tandem {place.version}, this is {ours}: install the same on all nodes of Ray"
            )
        return place

    async def call(self, method: str, *arguments: object, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """Raises `RankLost`."""
        try:
            return await self._call(method, arguments, timeout_s)
        except self._errors.ActorUnavailableError as error:
            raise RankLost(f"its Ray actor cannot be reached: {reason_of(error)}") from error

    async def batches(self) -> AsyncIterator[Batch]:
        """News of the process that runs there, until the caller has had enough. Raises `RankLost`; a disturbance of
        the network shorter than `SILENCE_S` only delays them."""
        next_number, silence = 0, Silence()
        while True:
            try:
                batch = batch_decoder.decode(await self._call("news", (next_number,), NEWS_TIMEOUT_S))
            except self._errors.ActorUnavailableError as error:
                if silence.goes_on_for(SILENCE_S):
                    raise RankLost(f"its Ray actor cannot be reached: {reason_of(error)}") from error
                await asyncio.sleep(RETRY_PAUSE_S)
                continue
            next_number = batch.next_number
            silence.ends()
            yield batch

    async def _call(self, method: str, arguments: tuple[object, ...], timeout_s: float) -> Any:
        try:
            return await within(timeout_s, getattr(self._actor, method).remote(*arguments))
        except TimeoutError:
            raise RankLost(f"its Ray actor did not answer within {timeout_s:g} s") from None
        except self._errors.ActorUnavailableError:
            raise
        except self._errors.RayError as error:
            has_died = isinstance(error, self._errors.RayActorError)
            raise RankLost(f"its Ray actor {'died' if has_died else 'failed'}: {reason_of(error)}") from error

    def post(self, method: str, *arguments: object) -> None:
        """Without an answer. That it has not arrived is noticed by `batches`."""
        with contextlib.suppress(self._errors.RayError):
            getattr(self._actor, method).remote(*arguments)

    async def close(self) -> None:
        """The process and its files go, then the actor. Bounded; an actor that is gone is not an error."""
        with contextlib.suppress(RankLost):
            await self.call("leave", timeout_s=CLOSE_TIMEOUT_S)
        with contextlib.suppress(self._errors.RayError, TimeoutError):  # the head is gone: they go with it
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await off_loop(self._ray.kill, self._actor)


def reason_of(error: Exception) -> str:
    """The line of Ray's long message that says why: of an exception in the actor its last one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith(TELLING) and RAISED not in line]
    text = (telling[0] if telling else " ".join(lines[-1:])).partition(GUESSES)[0]
    if NOT_INSTALLED in text:
        text += "; install the same Tandem on every node of Ray"
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]}…"
