"""What the one process of `--monolithic` is told at start."""

from __future__ import annotations

import msgspec

from cluster.control.worker_config import WorkerConfig
from cluster.router.config import RouterConfig


class MonolithicConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The worker's `host`, `port` and hand-over settings mean nothing here."""

    router: RouterConfig
    worker: WorkerConfig
