"""How many KV blocks an engine gets: what it was told, or a share of the memory that is free now."""

from __future__ import annotations

from pathlib import Path

from cluster.engine.config import EngineConfig
from cluster.engine.kv_cache import KVLayout
from cluster.errors import StartupError

# On a CPU several workers share the memory with everything else: a modest pool, four full contexts,
# within a quarter of what is free. What a GPU has room for is measured (`gpu/memory.py`).
CPU_NUM_CONTEXTS = 4
CPU_SHARE_OF_FREE = 0.25


def choose_num_blocks(
    layout: KVLayout, config: EngineConfig, max_model_len: int, draft_layout: KVLayout | None = None
) -> int:
    """Number of blocks of a pool in host memory: `config.kv_cache_bytes` if given; otherwise four contexts of
    `max_model_len` tokens within 25 % of the available memory. Raises as `blocks_of` does, and where more is asked
    for than there is."""
    if config.kv_cache_bytes is not None:
        _check_available(config.kv_cache_bytes)
        return blocks_of(layout, config.kv_cache_bytes, "kv_cache_bytes", max_model_len, draft_layout)
    blocks_per_context = -(-max_model_len // layout.block_size)
    available = available_memory_bytes()
    share = int(available * CPU_SHARE_OF_FREE)
    num_bytes = min(share, CPU_NUM_CONTEXTS * blocks_per_context * _block_bytes(layout, draft_layout))
    source = f"{CPU_SHARE_OF_FREE:.0%} of {available / 2**30:.2f} GiB available memory"
    return blocks_of(layout, num_bytes, source, max_model_len, draft_layout)


def blocks_of(
    layout: KVLayout,
    num_bytes: int,
    source: str,
    max_model_len: int,
    draft_layout: KVLayout | None = None,
    *,
    fix: str = "raise engine.kv_cache_bytes",
) -> int:
    """How many blocks fit into `num_bytes`; `source` says where that number comes from, `fix` what makes it larger.

    A draft model's pool has as many blocks, of `draft_layout`: both share the bytes.
    StartupError if one context does not fit: a request could then never run.
    """
    block_bytes = _block_bytes(layout, draft_layout)
    blocks_per_context = -(-max_model_len // layout.block_size)
    num_blocks = num_bytes // block_bytes
    if num_blocks < blocks_per_context:
        with_draft = "" if draft_layout is None else ", the draft model's KV included"
        raise StartupError(
            f"the KV pool is too small: one context of max_model_len {max_model_len} tokens needs "
            f"{blocks_per_context * block_bytes} bytes{with_draft}, there are {num_bytes} ({source}, room for "
            f"{num_blocks * layout.block_size} tokens); {fix}{' or lower engine.max_model_len' if num_blocks else ''}"
        )
    return num_blocks


def _check_available(num_bytes: int) -> None:
    """Before the kernel refuses it, or ends the process later, when it is written to."""
    try:
        available = available_memory_bytes()
    except StartupError:
        return  # nobody knows
    if num_bytes > available:
        raise StartupError(
            f"engine.kv_cache_bytes is {num_bytes} ({num_bytes / 2**30:.2f} GiB), of memory {available / 2**30:.2f} "
            "GiB are available: lower it"
        )


def _block_bytes(layout: KVLayout, draft_layout: KVLayout | None) -> int:
    return layout.block_bytes + (0 if draft_layout is None else draft_layout.block_bytes)


def available_memory_bytes() -> int:
    """Memory this process may still take: the machine's or its control group's, whichever is less."""
    available = _meminfo_available()
    group = Path("/sys/fs/cgroup")
    limit = _read_number(group / "memory.max")
    used = _read_number(group / "memory.current")
    if limit is not None and used is not None:
        available = min(available, max(limit - used, 0))
    return available


def _meminfo_available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise StartupError("/proc/meminfo has no MemAvailable: set engine.kv_cache_bytes")


def _read_number(path: Path) -> int | None:
    """None: no such limit, or no control groups of version 2 here."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
