"""A worker as it might introduce itself; a test names the fields it is about."""

from __future__ import annotations

from typing import Any

from cluster.types import Role, WorkerInfo, WorkerLoad

IDLE = WorkerLoad(num_running=0, num_waiting=0, num_free_blocks=4, num_blocks=4)


def worker_info(**fields: Any) -> WorkerInfo:
    values: dict[str, Any] = {
        "engine_id": "e",
        "role": Role.DECODE,
        "model_name": "m",
        "model_digest": "d",
        "numeric_fingerprint": "f",
        "max_model_len": 100,
        "vocab_size": 10,
        "block_size": 16,
        "num_blocks": 4,
        **fields,
    }
    return WorkerInfo(**values)
