"""What fits on a device, measured before anything is promised."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cluster.engine.config import DEFAULT_GPU_FRACTION, EngineConfig
from cluster.engine.kv_cache import KVCache, KVLayout
from cluster.errors import StartupError
from cluster.gpu_share import PIPE_VARIABLE, has_mps

logger = logging.getLogger(__name__)

GIB = 1 << 30
LESS_POOL = "lower engine.kv_cache_bytes or engine.gpu_memory_fraction"
MORE_POOL = "raise engine.gpu_memory_fraction, give the worker a GPU of its own"
# Beside the pool and what a step allocates: graphs, the libraries' workspaces, fragments.
RESERVE_BYTES = 768 << 20
_NEIGHBOUR_BYTES = 2 * GIB  # more than this process's own context and libraries take beside torch's memory
_NEIGHBOUR_S, _PAUSE_S = 15.0, 0.5  # how long a worker's largest comparisons and steps may take


def check_weights_fit(device: torch.device, num_bytes: int) -> None:
    """`StartupError` if the weights of this rank are larger than what is free now."""
    free, total = torch.cuda.mem_get_info(device)
    if num_bytes > free:
        raise StartupError(
            f"the weights need {_gib(num_bytes)} GiB on {device}, where {_gib(free)} of {_gib(total)} GiB are free"
            f"{_taken(device, free, total)}; use a GPU with more memory, a smaller model, or more ranks"
        )


@contextmanager
def room_for(what: str, device: torch.device, fix: str) -> Iterator[None]:
    """`StartupError` that names `what` and what to change, if the block takes more memory than there is."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        raise StartupError(
            f"{what} does not fit on {device}: {_gib(free)} of {_gib(total)} GiB are free"
            f"{_taken(device, free, total)}; {fix}"
        ) from error


def pool_bytes(config: EngineConfig, device: torch.device, step_bytes: int) -> tuple[int, str]:
    """Bytes for the KV pool, and where the number comes from, for a message.

    `step_bytes`: what the largest step allocates beside weights and pool, measured. The worker's share of
    the device, `gpu_memory_fraction`, holds everything: weights, pool, steps and a reserve.
    """
    if config.kv_cache_bytes is not None:
        _check_pool_fits(config.kv_cache_bytes, device, step_bytes + RESERVE_BYTES)
        return config.kv_cache_bytes, "kv_cache_bytes"
    free, total = torch.cuda.mem_get_info(device)
    fraction = config.gpu_memory_fraction or DEFAULT_GPU_FRACTION
    mine = torch.cuda.memory_reserved(device)
    room = min(int(total * fraction) - mine, free - int(total * (1 - DEFAULT_GPU_FRACTION) / 2))
    num_bytes = max(room - step_bytes - RESERVE_BYTES, 0)
    source = (
        f"{_gib(free)} of {_gib(total)} GiB free beside the weights{_taken(device, free, total)}, of which steps need "
        f"{_gib(step_bytes + RESERVE_BYTES)}; gpu_memory_fraction {fraction:g}"
    )
    return num_bytes, source


def _check_pool_fits(num_bytes: int, device: torch.device, step_bytes: int) -> None:
    """A pool that fits may leave too little for steps, which would be found out while requests run. A neighbour on the
    device that starts takes more for a moment than it keeps: so what is free is read again."""
    end_s = time.monotonic() + _NEIGHBOUR_S
    free, total = torch.cuda.mem_get_info(device)
    while num_bytes > free - step_bytes and time.monotonic() < end_s and _others(device, free, total) > GIB:
        time.sleep(_PAUSE_S)
        free, total = torch.cuda.mem_get_info(device)
    room = free - step_bytes
    if num_bytes > room:
        fix = f"set at most {room >> 20}MiB" if room > 0 else "use a GPU with more memory, or lower max_batched_tokens"
        raise StartupError(
            f"engine.kv_cache_bytes: {_gib(num_bytes)} GiB do not fit on {device}: {_gib(free)} of {_gib(total)} GiB "
            f"are free beside the weights{_taken(device, free, total)}, and steps need {_gib(step_bytes)}; {fix}"
        )


def warn_of_neighbours(device: torch.device) -> None:
    """Once, at start: nobody else would tell a worker that was not started by `cluster launch`."""
    free, total = torch.cuda.mem_get_info(device)
    others = _others(device, free, total)
    if others > _NEIGHBOUR_BYTES and not has_mps():
        logger.warning(
            "other processes use %s (%s GiB), and no MPS daemon listens (%s): they take turns with this one, "
            "and decode steps take more than twice as long while a prompt is computed",
            device,
            _gib(others),
            PIPE_VARIABLE,
        )


def allocate_pool(layout: KVLayout, num_blocks: int, device: torch.device) -> KVCache:
    """`StartupError` says what was asked for and what was there."""
    with room_for(f"the KV pool of {_gib(num_blocks * layout.block_bytes)} GiB", device, LESS_POOL):
        return KVCache(layout, num_blocks, device)


def _taken(device: torch.device, free: int, total: int) -> str:
    """Memory that others hold is worth a word: a forgotten process is the usual reason."""
    others = _others(device, free, total)
    return f" ({_gib(others)} GiB are in use by others)" if others > GIB else ""


def _others(device: torch.device, free: int, total: int) -> int:
    return total - free - torch.cuda.memory_reserved(device)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f}"
