"""Prefill and decode in separate processes over NIXL: the bits of one process, and nothing left behind."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import grpc.aio
import pytest
import pytest_asyncio

from cluster.errors import WorkerLost
from cluster.launch.ports import choose_free_port
from cluster.rpc import admin, limits
from cluster.rpc.client import Connection
from cluster.rpc.pb.serving.v1 import handover_pb2 as pb
from cluster.stop import ECHO_S
from cluster.types import FinishReason, Role
from tests.integration.worker_processes import (
    TOKEN_BYTES,
    Answer,
    WorkerProcess,
    alone,
    connected,
    continued,
    decode,
    eventually,
    is_idle,
    make_request,
    prefill,
    split,
    start,
)
from tests.unit.model_factory import random_model, save_safetensors
from tests.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")
LONG_ANSWER = 8000  # tokens, which take many seconds
LAST_ANSWER = 200  # tokens, which take much less than a drain may
LENGTHS = (1, 15, 16, 17, 31, 32, 33, 64, 96, 130, 200)


def as_it_is(payload: bytes) -> bytes:
    return payload


async def drain(stream: AsyncIterable[object]) -> None:
    async for _ in stream:
        pass


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_safetensors(random_model("llama"), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("key") / "cluster.key"
    path.write_text("k" * 32)
    path.chmod(0o600)
    return path


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def workers(model: Path, key_file: Path) -> AsyncIterator[dict[Role, WorkerProcess]]:
    # blocks of different sizes: the hand-over maps them
    async with AsyncExitStack() as stack:
        started = {}
        for role, engine in ((Role.PREFILL, {"block_size": 32}), (Role.DECODE, {})):
            worker = started[role] = await start(role, model, key_file, engine=engine)
            stack.push_async_callback(worker.stop, signal.SIGKILL)
        yield started
        codes = [await worker.stop() for worker in started.values()]
        assert codes == [0, 0]
        assert [worker.strangers for worker in started.values()] == [[], []]


@pytest_asyncio.fixture(loop_scope="module")
async def pair(workers: dict[Role, WorkerProcess]) -> AsyncIterator[tuple[Connection, Connection]]:
    connections = (await connected(workers[Role.PREFILL]), await connected(workers[Role.DECODE]))
    yield connections
    for worker in workers.values():
        await eventually(partial(is_idle, worker))
    for connection in connections:
        await connection.close()


@asynccontextmanager
async def own_workers(
    model: Path, key_file: Path, **settings: object
) -> AsyncIterator[tuple[list[WorkerProcess], tuple[Connection, Connection]]]:
    """A prefill and a decode worker for one test; killed at its end if they still run."""
    async with AsyncExitStack() as stack:
        workers = []
        for role in (Role.PREFILL, Role.DECODE):
            workers.append(await start(role, model, key_file, **settings))
            stack.push_async_callback(workers[-1].stop, signal.SIGKILL)
        connections = (await connected(workers[0]), await connected(workers[1]))
        for connection in connections:
            stack.push_async_callback(connection.close)
        yield workers, connections


async def test_tokens_and_logprob_bits_are_those_of_one_process(pair: tuple[Connection, Connection]) -> None:
    for length in LENGTHS:
        for temperature in (0.0, 0.9):
            name = f"{length}-{temperature}"
            got = await split(*pair, make_request(f"split-{name}", length, temperature=temperature))
            salted = make_request(f"alone-{name}", length, temperature=temperature, salt=b"apart")
            expected = await alone(pair[1], salted)
            assert got.error == ""
            assert got == expected, name
    load = pair[1].load
    assert load is not None
    assert load.kv_transfers > 0
    assert load.kv_transfer_failures == 0


async def test_concurrent_requests(pair: tuple[Connection, Connection]) -> None:
    requests = [make_request(f"c{length}", length, temperature=1.0, salt=b"one") for length in range(20, 180, 20)]
    got = await asyncio.gather(*(split(*pair, request) for request in requests))
    again = [make_request(f"d{length}", length, temperature=1.0, salt=b"two") for length in range(20, 180, 20)]
    assert got == [await alone(pair[1], request) for request in again]


async def test_kv_digests_are_equal_on_both_sides(
    workers: dict[Role, WorkerProcess], pair: tuple[Connection, Connection]
) -> None:
    request = make_request("digest", 96, salt=b"digest")
    await split(*pair, request)
    sides = [await admin.inspect(worker.address, request.token_ids, request.cache_salt) for worker in workers.values()]
    assert [side.num_digest_tokens for side in sides] == [96, 96]
    assert sides[0].kv_digests == sides[1].kv_digests
    assert len(set(sides[0].kv_digests)) == 3


async def test_leaving_in_mid_stream_frees_everything(pair: tuple[Connection, Connection]) -> None:
    """The fixture checks that both sides are idle afterwards."""
    request = make_request("left", 100, max_tokens=100)
    result = await prefill(pair[0], request)
    stream = pair[1].decode(continued(request, result), result.kv)
    await anext(stream)
    await stream.aclose()
    unread = await prefill(pair[0], make_request("unread", 60))
    assert unread.kv is not None
    pair[0].release("unread", 0)


async def test_garbage_harms_nobody(workers: dict[Role, WorkerProcess], pair: tuple[Connection, Connection]) -> None:
    async with grpc.aio.insecure_channel(workers[Role.PREFILL].address) as channel:
        raw = channel.unary_unary(f"/{limits.SERVICE_NAME}/Handshake", as_it_is, as_it_is)
        for payload in (b"", b"\xff" * 100, pb.HandshakeRequest(engine_id="x").SerializeToString()):
            with pytest.raises(grpc.aio.AioRpcError):
                await raw(payload, timeout=10)
        garbage = iter([b"\x08\x63", b"\xff\xff"])
        session = channel.stream_stream(f"/{limits.SERVICE_NAME}/Session", as_it_is, as_it_is)(garbage)
        with pytest.raises(grpc.aio.AioRpcError):
            await drain(session)
    answer = Answer()
    await decode(pair[1], make_request("forged", 30), b"no ticket", answer)
    assert answer.error.startswith("ticket_invalid")
    assert (await split(*pair, make_request("after", 40))).error == ""


@pytest.mark.slow
async def test_other_weights_are_refused_by_name(
    key_file: Path, workers: dict[Role, WorkerProcess], pair: tuple[Connection, Connection], tmp_path: Path
) -> None:
    other = save_safetensors(random_model("llama", seed=1), tmp_path)
    stranger = await start(Role.PREFILL, other, key_file)
    connection = await connected(stranger)
    try:
        answer = await split(connection, pair[1], make_request("mismatch", 40))
        assert answer.error.startswith("handshake_mismatch")
        assert "weights_digest" in answer.error
        connection.release("mismatch", 0)
        await eventually(lambda: is_idle(stranger))
    finally:
        await connection.close()
        assert await stranger.stop() == 0


@pytest.mark.slow
async def test_prefill_killed_and_restarted_vllm_58063_49238(
    model: Path, key_file: Path, pair: tuple[Connection, Connection]
) -> None:
    port = choose_free_port("127.0.0.1")  # one that nobody is given while neither of the two listens
    doomed = await start(Role.PREFILL, model, key_file, port=port)
    connection = await connected(doomed)
    request = make_request("orphan", 120)
    assert (await split(connection, pair[1], make_request("before", 50))).error == ""
    result = await prefill(connection, request)
    await doomed.stop(signal.SIGKILL)
    answer = Answer()
    answer.add(result.first)
    await decode(pair[1], continued(request, result), result.kv, answer)  # recomputed: the same bits
    assert answer == await alone(pair[1], make_request("orphan-alone", 120, salt=b"apart"))
    successor = await start(Role.PREFILL, model, key_file, port=port)
    try:
        await until(lambda: connection.is_ready)
        again = await split(connection, pair[1], make_request("again", 120))
        assert again.tokens == answer.tokens
        await eventually(lambda: is_idle(successor))
    finally:
        await connection.close()
        assert await successor.stop() == 0


@pytest.mark.slow
async def test_stopped_worker_is_noticed(key_file: Path, tmp_path: Path) -> None:
    """SIGSTOP: the connection stays open and nothing comes. Then SIGTERM while a request runs: a drain."""
    async with one_for_long_answers(key_file, tmp_path) as (worker, connection):
        stream = connection.decode(make_request("frozen", 20, max_tokens=LONG_ANSWER), None)
        await anext(stream)
        worker.process.send_signal(signal.SIGSTOP)
        with pytest.raises(WorkerLost):
            await asyncio.wait_for(drain(stream), 60)
        worker.process.send_signal(signal.SIGCONT)
        await until(lambda: connection.is_ready)
        await eventually(lambda: is_idle(worker))
        running = connection.decode(make_request("last", 20, max_tokens=LAST_ANSWER), None)
        chunks = [await anext(running)]
        worker.process.send_signal(signal.SIGTERM)
        chunks += [chunk async for chunk in running]
        assert chunks[-1].finish_reason is FinishReason.LENGTH
        assert sum(len(chunk.token_ids) for chunk in chunks) == LAST_ANSWER


@pytest.mark.slow
async def test_a_second_sigterm_ends_a_worker_in_the_midst_of_an_answer(key_file: Path, tmp_path: Path) -> None:
    async with one_for_long_answers(key_file, tmp_path) as (worker, connection):
        stream = connection.decode(make_request("cut", 20, max_tokens=LONG_ANSWER), None)
        await anext(stream)
        worker.process.send_signal(signal.SIGTERM)
        reading = asyncio.create_task(drain(stream))
        await asyncio.sleep(ECHO_S + 0.5)
        assert not reading.done()
        assert await worker.stop() == 0
        with pytest.raises(WorkerLost):
            await reading


@asynccontextmanager
async def one_for_long_answers(key_file: Path, tmp_path: Path) -> AsyncIterator[tuple[WorkerProcess, Connection]]:
    """A decode worker that is some seconds over LONG_ANSWER tokens, and ends with 0."""
    model = save_safetensors(random_model("llama", max_position_embeddings=2 * LONG_ANSWER), tmp_path)
    engine = {"kv_cache_bytes": 2 * LONG_ANSWER * TOKEN_BYTES}
    worker = await start(Role.DECODE, model, key_file, engine=engine)
    connection = await connected(worker)
    try:
        yield worker, connection
    finally:
        await connection.close()
        assert await worker.stop() == 0


@pytest.mark.slow
async def test_workers_meet_over_ipv6(model: Path, key_file: Path, pair: tuple[Connection, Connection]) -> None:
    """As in a pod with an IPv6 address: they listen on all of them and say theirs."""
    if not has_ipv6_loopback():
        pytest.skip("this machine has no ::1")
    settings = {"host": "::", "advertised_host": "::1", "allow_plaintext_network": True}
    async with own_workers(model, key_file, **settings) as (workers, connections):
        answer = await split(*connections, make_request("six", 120))
        assert answer == await alone(pair[1], make_request("not-six", 120, salt=b"apart"))
        load = connections[1].load
        assert load is not None
        assert load.kv_transfers > 0
        assert load.kv_transfer_failures == 0
        assert [await worker.stop() for worker in workers] == [0, 0]


def has_ipv6_loopback() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.mark.slow
async def test_a_hand_over_survives_that_both_workers_are_stopped_in_its_midst(
    model: Path, key_file: Path, pair: tuple[Connection, Connection]
) -> None:
    """SIGTERM to both once the first token is there, as when a whole deployment is deleted. Each is told twice: by who
    stops the whole group of processes, and by its launcher."""
    async with own_workers(model, key_file) as (workers, connections):
        request, answer = make_request("last", 120), Answer()
        with connections[1].promised():
            result = await prefill(connections[0], request)
            answer.add(result.first)
            for worker in workers:
                worker.process.send_signal(signal.SIGTERM)
            await until(lambda: not any(connection.is_ready for connection in connections))
            assert all(connection.last_error == "" for connection in connections), "they drain, and are there"
            for worker in workers:
                worker.process.send_signal(signal.SIGTERM)
            await decode(connections[1], continued(request, result), result.kv, answer)
        assert answer == await alone(pair[1], make_request("not-last", 120, salt=b"apart"))
        assert [await worker.stop() for worker in workers] == [0, 0]


@pytest.mark.slow
async def test_a_start_that_fails_says_why(
    model: Path, key_file: Path, workers: dict[Role, WorkerProcess], tmp_path: Path
) -> None:
    port = int(workers[Role.DECODE].address.rpartition(":")[2])
    missing = tmp_path / "no-model"
    failures = await asyncio.gather(
        start(Role.DECODE, model, key_file, port=port),
        start(Role.PREFILL, missing, key_file),
        start(Role.PREFILL, model, tmp_path / "no-key"),
        start(Role.PREFILL, model, key_file, lease=1),
        start(Role.DECODE, model, key_file, host="0.0.0.0"),
    )
    codes = [await worker.process.wait() for worker in failures]
    assert codes == [1] * 5
    told = [(worker.failure.code, worker.failure.message) for worker in failures]
    expected = [
        ("startup_error", str(port)),
        ("model_error", str(missing)),
        ("config_error", "no-key"),
        ("config_error", "lease"),
        ("config_error", "0.0.0.0"),
    ]
    for (code, message), (expected_code, word) in zip(told, expected, strict=True):
        assert code == expected_code
        assert word in message
