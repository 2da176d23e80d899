"""What fits on a GPU, told before anything is served; on a device whose memory is made up."""

from __future__ import annotations

import pytest
import torch

from cluster.engine.config import EngineConfig
from cluster.engine.gpu import memory
from cluster.engine.gpu.memory import GIB, RESERVE_BYTES, pool_bytes
from cluster.errors import StartupError

DEVICE, STEP_BYTES = torch.device("cuda", 0), 2 * GIB


@pytest.fixture(autouse=True)
def device_with_40_of_100_gib_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40 * GIB, 100 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50 * GIB)
    monkeypatch.setattr(memory, "_NEIGHBOUR_S", 0.2)
    monkeypatch.setattr(memory, "_PAUSE_S", 0.01)


def test_a_pool_that_was_asked_for_leaves_room_for_steps() -> None:
    most = 40 * GIB - STEP_BYTES - RESERVE_BYTES
    assert pool_bytes(EngineConfig(kv_cache_bytes=most), DEVICE, STEP_BYTES) == (most, "kv_cache_bytes")
    message = (
        r"engine.kv_cache_bytes: 37.25 GiB do not fit on cuda:0: 40.00 of 100.00 GiB are free beside the weights "
        rf"\(10.00 GiB are in use by others\), and steps need 2.75; set at most {most >> 20}MiB"
    )
    with pytest.raises(StartupError, match=message):
        pool_bytes(EngineConfig(kv_cache_bytes=most + 1), DEVICE, STEP_BYTES)
    with pytest.raises(StartupError, match="use a GPU with more memory, or lower max_batched_tokens"):
        pool_bytes(EngineConfig(kv_cache_bytes=1), DEVICE, 40 * GIB)


def test_a_neighbour_that_starts_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_NEIGHBOUR_S", 20.0)
    free = [20, 25, 40]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free.pop(0) * GIB, 100 * GIB))
    assert pool_bytes(EngineConfig(kv_cache_bytes=30 * GIB), DEVICE, STEP_BYTES)[0] == 30 * GIB
    assert free == []
    free.extend([20, 40])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 80 * GIB)
    with pytest.raises(StartupError, match=r"30\.00 GiB do not fit"):  # nobody else is there
        pool_bytes(EngineConfig(kv_cache_bytes=30 * GIB), DEVICE, STEP_BYTES)


def test_a_pool_that_was_not_asked_for_takes_what_is_left_of_the_share() -> None:
    num_bytes, source = pool_bytes(EngineConfig(gpu_memory_fraction=0.8), DEVICE, STEP_BYTES)
    assert num_bytes == 30 * GIB - STEP_BYTES - RESERVE_BYTES
    assert "gpu_memory_fraction 0.8" in source


@pytest.mark.parametrize(
    ("others_gib", "runs_mps", "warns"), [(10, False, True), (10, True, False), (1, False, False), (3, False, True)]
)
def test_a_worker_that_takes_turns_with_a_neighbour_says_so(
    others_gib: int, runs_mps: bool, warns: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: (60 - others_gib) * GIB)
    monkeypatch.setattr(memory, "has_mps", lambda: runs_mps)
    memory.warn_of_neighbours(DEVICE)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == warns
    if warns:
        assert messages[0].startswith(f"other processes use cuda:0 ({others_gib}.00 GiB), and no MPS daemon listens")
