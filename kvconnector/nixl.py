"""KV between processes through NIXL's UCX backend.

Used of NIXL: agents, registration, its own metadata format, READ and notifications. Not used: its
Python helpers that serialise descriptors with pickle. Metadata from a peer is parsed by NIXL itself
(C++, tagged and length-checked); what the agent is called must be what the handshake said.

On one machine UCX reads shared memory or another process's memory directly, and a small READ is over
when it is posted; so callers bound what they post at once. A peer that dies makes its READs end in an
error at once; one that is only stopped leaves them running, and their memory must be kept.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import numpy as np
import torch

from cluster.errors import StartupError, TransferFailed
from kvconnector.base import PeerDescription, PeerId, Piece, Region, TransferId, TransferState

logger = logging.getLogger(__name__)

MAX_METADATA_BYTES = 1 << 20
_BACKEND = "UCX"
# NIXL's Python API fixes this at 0: its progress thread then spins and takes a whole core from the
# engine, in every idle worker (3.0 s of CPU time in 3 s; with 1 ms 0.06 s).
_PROGRESS_PAUSE_US = 1000
_Result = TypeVar("_Result")

# Defaults only: what the operator has set in the environment wins.
_ENVIRONMENT = {
    "UCX_LOG_FILE": "stderr",  # stdout belongs to process events
    "UCX_LOG_LEVEL": "error",
    "NIXL_LOG_LEVEL": "ERROR",
    "UCX_KEEPALIVE_INTERVAL": "2s",  # a peer that vanished ends its READs within seconds (20 s otherwise)
}
_CPU_ENVIRONMENT = {
    # Without a GPU or an RDMA card UCX tries many transports in vain; "sm" is shared memory and CMA.
    "UCX_TLS": "tcp,sm,self",
    # Where a libefa is installed UCX's InfiniBand modules load it, and with it a second libibverbs and libnl beside
    # those of NIXL: the process then ends with a segmentation fault.
    "UCX_MODULES": "^ib",
}
_CUDA_ENVIRONMENT = {
    # Without it two GPUs of one host, or two processes on one, go through host memory and TCP: 0.5 GB/s
    # instead of 1,321 (one H100, one descriptor, UCX of NIXL 1.5.1).
    "UCX_CUDA_IPC_ENABLE_GET_ZCOPY": "on",
}


def configure_environment(device: torch.device) -> None:
    """Set UCX's and NIXL's defaults for this process; to be called before the first `NixlTransport`."""
    defaults = dict(_ENVIRONMENT)
    if device.type == "cuda":
        defaults |= _CUDA_ENVIRONMENT
    elif not Path("/sys/class/infiniband").is_dir():
        defaults |= _CPU_ENVIRONMENT
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


class _PacedBindings:
    """NIXL's bindings, but for the pause of the progress thread, which its Python API offers no way to set."""

    def __init__(self, bindings: Any) -> None:
        self._bindings = bindings

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bindings, name)

    def nixlAgent(self, name: str, config: Any) -> Any:
        config.pthrDelay = _PROGRESS_PAUSE_US
        return self._bindings.nixlAgent(name, config)


def _make_agent(api: Any, name: str) -> Any:
    config = api.nixl_agent_config(enable_prog_thread=True, backends=[_BACKEND])
    with mock.patch.object(api, "nixlBind", _PacedBindings(api.nixlBind)):
        return api.nixl_agent(name, config)


class NixlTransport:
    """A `Transport` (see `base.py`) with one NIXL agent named like the engine. One thread only; NIXL's
    own progress thread serves peers while that thread computes."""

    name = "nixl"

    def __init__(self, engine_id: str) -> None:
        from nixl import _api  # loads the libraries and reads the environment

        self._engine_id = engine_id
        bindings = vars(_api.nixlBind).values()
        self._errors: tuple[type[Exception], ...] = tuple(
            kind for kind in bindings if isinstance(kind, type) and issubclass(kind, Exception)
        )
        try:
            self._agent: Any = _make_agent(_api, engine_id)
        except self._errors as error:
            raise StartupError(f"NIXL could not start: {error}") from error
        if _BACKEND not in self._agent.backends:
            raise StartupError("NIXL has no UCX plugin here: reinstall the nixl package")
        self._regions: dict[str, Region] = {}
        self._registrations: list[Any] = []
        self._peers: dict[PeerId, dict[str, Region]] = {}
        self._leaving: set[PeerId] = set()  # disconnected here, but READs from them still run
        self._reads: dict[TransferId, tuple[PeerId, Any]] = {}
        self._next_id = 0

    def register(self, name: str, memory: torch.Tensor) -> Region:
        assert memory.is_contiguous()
        region = Region(name, memory.data_ptr(), memory.numel() * memory.element_size(), memory.get_device())
        descriptor = [(region.address, region.num_bytes, max(region.device_id, 0), "")]
        try:
            self._registrations.append(self._agent.register_memory(descriptor, _memory_type(region), [_BACKEND]))
        except self._errors as error:
            raise StartupError(f"{region.num_bytes} bytes of {name} memory cannot be registered: {error}") from error
        self._regions[name] = region
        return region

    def describe(self) -> PeerDescription:
        metadata: bytes = self._agent.get_agent_metadata()
        return PeerDescription(self._engine_id, self.name, metadata, tuple(self._regions.values()))

    def connect(self, peer: PeerDescription) -> PeerId:
        peer_id = PeerId(peer.engine_id)
        if peer_id in self._peers:
            return peer_id
        if peer_id in self._leaving:
            raise TransferFailed(f"earlier READs from {peer_id} have not ended yet")
        if len(peer.agent_metadata) > MAX_METADATA_BYTES:
            raise TransferFailed(f"metadata of {len(peer.agent_metadata)} bytes from {peer_id}")
        agent_name = self._mapped("connect", lambda: self._agent.add_remote_agent(peer.agent_metadata))
        if agent_name != peer.engine_id.encode():
            self._mapped("disconnect", lambda: self._agent.remove_remote_agent(agent_name))
            raise TransferFailed(f"{peer_id} sent the metadata of another agent")
        self._peers[peer_id] = {region.name: region for region in peer.regions}
        return peer_id

    def disconnect(self, peer: PeerId) -> None:
        if self._peers.pop(peer, None) is not None:
            self._leaving.add(peer)
            self._forget_if_idle(peer)

    def read(self, peer: PeerId, region: str, local_region: str, pieces: Sequence[Piece]) -> TransferId:
        """After `TransferFailed`, too, pieces may be on their way: UCX posts one after the other and cancels none."""
        remote = self._peers.get(peer, {}).get(region)
        if remote is None:
            raise TransferFailed(f"peer {peer} is not connected or has no memory {region!r}")
        local = self._regions[local_region]
        _check_bounds(pieces, remote, local)
        remote_list = self._descriptors(remote, [(piece.source_offset, piece.num_bytes) for piece in pieces])
        local_list = self._descriptors(local, [(piece.destination_offset, piece.num_bytes) for piece in pieces])
        handle = self._mapped(
            "prepare a READ", lambda: self._agent.initialize_xfer("READ", local_list, remote_list, peer)
        )
        try:
            if self._mapped("post a READ", lambda: self._agent.transfer(handle)) == "ERR":
                raise TransferFailed(f"a READ from {peer} could not be posted")
        except TransferFailed:
            self._ignoring_errors(lambda: self._agent.release_xfer_handle(handle))
            raise
        self._next_id += 1
        self._reads[TransferId(self._next_id)] = (peer, handle)
        return TransferId(self._next_id)

    def poll(self, transfer: TransferId) -> TransferState:
        peer, handle = self._reads[transfer]
        try:
            status = self._agent.check_xfer_state(handle)
        except self._errors as error:
            logger.warning("a READ from %s failed: %s", peer, error)
            status = "ERR"
        if status == "PROC":
            return TransferState.RUNNING
        del self._reads[transfer]
        self._ignoring_errors(lambda: self._agent.release_xfer_handle(handle))
        self._forget_if_idle(peer)
        return TransferState.DONE if status == "DONE" else TransferState.FAILED

    def notify(self, peer: PeerId, message: bytes) -> bool:
        return peer in self._peers and self._ignoring_errors(lambda: self._agent.send_notif(peer, message))

    def notifications(self) -> list[tuple[PeerId, bytes]]:
        arrived: dict[str, list[bytes]] = self._agent.get_new_notifs()
        return [(PeerId(sender), message) for sender, messages in arrived.items() for message in messages]

    def close(self) -> None:
        assert not self._reads, "a transfer is running"
        for peer in (*self._peers, *self._leaving):
            self._ignoring_errors(partial(self._agent.remove_remote_agent, peer))
        for registration in self._registrations:
            self._ignoring_errors(partial(self._agent.deregister_memory, registration))
        self._peers.clear()
        self._registrations.clear()
        self._regions.clear()

    def _descriptors(self, region: Region, ranges: list[tuple[int, int]]) -> Any:
        rows = np.empty((len(ranges), 3), dtype=np.uint64)
        rows[:, :2] = ranges
        rows[:, 0] += np.uint64(region.address)
        rows[:, 2] = max(region.device_id, 0)
        return self._agent.get_xfer_descs(rows, _memory_type(region))

    def _forget_if_idle(self, peer: PeerId) -> None:
        """NIXL must not forget a peer while a READ from it runs."""
        if peer in self._leaving and all(reader != peer for reader, _ in self._reads.values()):
            self._leaving.remove(peer)
            self._ignoring_errors(lambda: self._agent.remove_remote_agent(peer))

    def _mapped(self, action: str, call: Callable[[], _Result]) -> _Result:
        try:
            return call()
        except self._errors as error:
            raise TransferFailed(f"could not {action}: {error}") from error

    def _ignoring_errors(self, call: Callable[[], object]) -> bool:
        """For what is best effort, or cannot go wrong in a way that matters any more. False: it did."""
        try:
            call()
        except self._errors as error:
            logger.debug("ignored: %s", error)
            return False
        return True


def _memory_type(region: Region) -> str:
    return "DRAM" if region.device_id < 0 else "VRAM"


def _check_bounds(pieces: Sequence[Piece], remote: Region, local: Region) -> None:
    for piece in pieces:
        if not 0 <= piece.source_offset <= piece.source_offset + piece.num_bytes <= remote.num_bytes:
            raise TransferFailed(f"a piece lies outside of the peer's {remote.name!r} memory")
        assert 0 <= piece.destination_offset <= piece.destination_offset + piece.num_bytes <= local.num_bytes
