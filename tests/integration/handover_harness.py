"""A prefill and a decode worker on one thread, over the loopback transport, with a clock that tests move.

The model is `tests/unit/engine_fakes.py`'s: its tokens depend on every KV row that lies in the cache, so a
block that was not transferred, or comes from elsewhere, changes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import msgspec

from cluster.control.driver import WorkerDriver
from cluster.control.handshake import HandshakeServer, identity_from_pb, identity_to_pb, read_reply
from cluster.control.messages import Cancel, Command, Inspect, PeerAnswer, PeerQuestion, Release, Submit, WorkerEvent
from cluster.engine.config import EngineConfig
from cluster.engine.engine import Engine
from cluster.engine.kernels.ops import Ops
from cluster.engine.kv_cache import KVLayout
from cluster.engine.scheduler import Policy
from cluster.rpc.base import Inspection
from cluster.rpc.pb.serving.v1 import handover_pb2 as pb
from cluster.types import PrefillResult, PrefillStarted, Request, TokenChunk
from decode.policy import DecodePolicy
from decode.worker import DecodeDriver
from kvconnector.core.handshake import KVIdentity
from kvconnector.loopback import LoopbackHub, LoopbackTransport
from kvconnector.mapping import Shard
from prefill.policy import PrefillPolicy
from prefill.worker import PrefillDriver
from tests.unit.engine_fakes import FakeModel, FakeOps, make_request

KEY = b"k" * 32
LEASE_S = 10.0
IDENTITY = KVIdentity(
    config_digest="c",
    weights_digest="w",
    kv_dtype="bfloat16",
    attention_kind="mha",
    num_layers=2,
    num_kv_heads=1,
    head_size=4,
    rope="",
    kv_layout="NL2HSD",
    numeric_fingerprint="f",
    transports=("loopback",),
)


class _Model(FakeModel):
    def kv_layout(self, block_size: int) -> KVLayout:
        return KVLayout(num_layers=2, num_kv_heads=1, head_size=4, block_size=block_size)


def make_engine(policy: Policy, block_size: int, num_blocks: int, max_batched_tokens: int = 64) -> Engine:
    model = _Model()
    config = EngineConfig(
        block_size=block_size,
        kv_cache_bytes=num_blocks * model.kv_layout(block_size).block_bytes,
        max_num_sequences=8,
        max_batched_tokens=max_batched_tokens,
        max_model_len=256,
    )
    return Engine(model, config, cast(Ops, FakeOps()), policy, clock=lambda: 0.0)


@dataclass
class Prefill:
    """One prefill worker and how it answers handshakes."""

    driver: PrefillDriver
    transport: LoopbackTransport
    engine_id: str
    identity: KVIdentity = IDENTITY

    def answer(self, question: PeerQuestion, theirs: KVIdentity) -> PeerAnswer:
        server = HandshakeServer(
            self.engine_id, self.identity, Shard(layout=self.driver.engine.layout), self.transport.describe()
        )
        request = pb.HandshakeRequest(engine_id="decode", identity=identity_to_pb(theirs))
        assert identity_from_pb(request.identity) == theirs
        return read_reply(question, pb.HandshakeReply.FromString(server.answer(request).SerializeToString()))


class Pair:
    """`run` turns both workers until they are idle or `turns` are over; events are kept by request."""

    def __init__(
        self,
        *,
        prefill_block_size: int = 16,
        decode_block_size: int = 16,
        prefill_blocks: int = 64,
        decode_blocks: int = 64,
        on_failure: Literal["recompute", "fail"] = "recompute",
        chunk: int = 64,
    ) -> None:
        self.now = 0.0
        self.hub = LoopbackHub()
        self.events: dict[str, list[WorkerEvent]] = {}
        self.inspections: dict[int, Inspection] = {}
        self.answers_handshakes = True
        self.prefills: dict[str, Prefill] = {}
        self.prefill = self.add_prefill("prefill-1", prefill_block_size, prefill_blocks, chunk)
        self.decode = DecodeDriver(
            make_engine(DecodePolicy(), decode_block_size, max(decode_blocks, 256 // decode_block_size)),
            LoopbackTransport("decode-1", self.hub),
            cluster_key=KEY,
            load_timeout_s=20.0,
            on_failure=on_failure,
        )

    def add_prefill(self, engine_id: str, block_size: int = 16, num_blocks: int = 64, chunk: int = 64) -> Prefill:
        transport = LoopbackTransport(engine_id, self.hub)
        driver = PrefillDriver(
            make_engine(PrefillPolicy(), block_size, num_blocks, chunk),
            transport,
            engine_id=engine_id,
            cluster_key=KEY,
            lease_s=LEASE_S,
        )
        driver.endpoint = "prefill:1"
        made = self.prefills[engine_id] = Prefill(driver, transport, engine_id)
        return made

    def turn(self, *, prefill: bool = True, decode: bool = True) -> bool:
        """One turn of each; True if anything was new."""
        self.now += 0.001
        drivers: list[WorkerDriver] = []
        if prefill:
            drivers += [each.driver for each in self.prefills.values()]
        if decode:
            drivers.append(self.decode)
        return sum(self._turn(driver) for driver in drivers) > 0  # every one has its turn

    def _turn(self, driver: WorkerDriver) -> bool:
        news = driver.turn(self.now)
        if news is None:
            return False
        for event in news.events:
            request_id = event.first.request_id if isinstance(event, PrefillResult) else event.request_id
            self.events.setdefault(request_id, []).append(event)
        self.inspections.update(news.inspections)
        for question in news.questions:
            peer = self.prefills.get(question.engine_id)
            if self.answers_handshakes:
                answer = PeerAnswer(question.engine_id, failure="gone")
                if peer is not None:
                    answer = peer.answer(question, IDENTITY)
                driver.handle(answer, self.now)
        return True

    def run(self, *, turns: int = 3000) -> None:
        """Until nothing has been new for a while."""
        quiet = 0
        for _ in range(turns):
            quiet = 0 if self.turn() else quiet + 1
            if quiet > 20 and not self.decode.engine.has_work():
                return

    def advance(self, seconds: float) -> None:
        self.now += seconds

    def compute(self, request: Request, prefill: Prefill | None = None) -> PrefillResult:
        """Prefill, to its end."""
        (prefill or self.prefill).driver.handle(Submit(request, None), self.now)
        for _ in range(2000):
            self.turn(decode=False)
            results = [event for event in self.events.get(request.request_id, []) if isinstance(event, PrefillResult)]
            if results:
                return results[0]
        raise AssertionError("no result")

    def start_decode(self, request: Request, result: PrefillResult) -> None:
        self.events.pop(request.request_id, None)
        self.send(Submit(continued(request, result.first), result.kv))

    def split(self, request: Request) -> list[int]:
        """All tokens of a request by way of both workers."""
        result = self.compute(request)
        if result.kv is None:
            return list(result.first.token_ids)
        self.start_decode(request, result)
        self.run()
        return [*result.first.token_ids, *self.tokens(request.request_id)]

    def alone(self, request: Request) -> list[int]:
        """All tokens of a request by a decode worker of its own."""
        engine = make_engine(DecodePolicy(), 16, 64)
        engine.add_request(request)
        tokens: list[int] = []
        while engine.has_work():
            for event in engine.step():
                assert isinstance(event, TokenChunk)
                tokens += event.token_ids
        return tokens

    def send(self, command: Command) -> None:
        self.decode.handle(command, self.now)

    def cancel(self, request: Request) -> None:
        self.send(Cancel(request.request_id, request.attempt))

    def release(self, request: Request) -> None:
        self.prefill.driver.handle(Release(request.request_id, request.attempt), self.now)

    def chunks(self, request_id: str) -> list[TokenChunk]:
        return [event for event in self.events.get(request_id, []) if isinstance(event, TokenChunk)]

    def tokens_so_far(self, request_id: str) -> list[int]:
        return [token for chunk in self.chunks(request_id) for token in chunk.token_ids]

    def tokens(self, request_id: str) -> list[int]:
        """Of a request that ended well; its chunks must be in order, with one terminal event."""
        chunks = self.chunks(request_id)
        assert [chunk.finish_reason is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        assert chunks[-1].error is None, chunks[-1].error
        return [token for chunk in chunks for token in chunk.token_ids]

    def handle_of(self, request_id: str) -> bytes:
        [started] = [event for event in self.events[request_id] if isinstance(event, PrefillStarted)]
        return started.kv

    def error_code(self, request_id: str) -> str:
        [chunk] = self.chunks(request_id)
        assert chunk.error is not None
        return chunk.error.code

    def inspect(self, driver: WorkerDriver, token_ids: tuple[int, ...] = ()) -> Inspection:
        number = len(self.inspections) + 1
        driver.handle(Inspect(number, token_ids, b""), self.now)
        for _ in range(5):
            self._turn(driver)
            if number in self.inspections:
                return self.inspections[number]
        raise AssertionError("no inspection")

    def assert_nothing_held(self) -> None:
        """After everything has ended: every block is free on both sides, and the books are in order."""
        for driver in (*(each.driver for each in self.prefills.values()), self.decode):
            inspection = self.inspect(driver)
            assert inspection.integrity_error == ""
            assert (inspection.num_owned, inspection.num_leased, inspection.num_draining) == (0, 0, 0)
            assert inspection.num_free == inspection.num_blocks
            assert (inspection.num_leases, inspection.num_requests) == (0, 0)
        assert len(self.decode._admission._landing._free) == len(self.decode._admission._landing.memory)


def continued(request: Request, first: TokenChunk) -> Request:
    return msgspec.structs.replace(
        request, token_ids=request.token_ids + first.token_ids, num_prompt_tokens=len(request.token_ids)
    )


def prompt(request_id: str, length: int, seed: int = 0, **sampling: Any) -> Request:
    token_ids = tuple((at * 7 + seed * 13 + at * at) % 58 for at in range(length))
    return make_request(request_id, token_ids, ignore_eos=True, **sampling)
