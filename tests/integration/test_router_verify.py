"""`cluster verify` against routers with fake workers: equal deployments, one wrong bit, a recorded file."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

import pytest
from rich.console import Console

from cluster.errors import ConfigError
from cluster.types import Role
from cluster.verify import VerifyOptions, run, verify
from tests.fakes import FakeWorker
from tests.integration.router_harness import running_router

OPTIONS = VerifyOptions(num_prompts=24, max_tokens=4, concurrency=(1, 8))


async def test_monolithic_and_split_are_equal() -> None:
    split = ([FakeWorker(Role.DECODE)], [FakeWorker(Role.PREFILL)])
    async with running_router([FakeWorker(Role.DECODE)]) as first, running_router(*split) as second:
        report = await verify(first.url, f"{second.url}/v1/", OPTIONS)
    assert report.is_equal
    assert [(cell.concurrency, cell.num_prompts, cell.num_tokens) for cell in report.cells] == [
        (1, 24, 96),
        (1, 24, 96),
        (8, 24, 96),
        (8, 24, 96),
    ]
    lengths = {request.prompt_length for request in split[0][0].requests}
    assert {1, 15, 16, 17, 31, 32, 33, 1500} <= lengths
    assert {request.sampling.is_greedy for request in split[0][0].requests} == {True, False}


async def test_one_wrong_bit_is_found_and_shown() -> None:
    wrong = FakeWorker(Role.DECODE)
    wrong.flips_bit_at = 2
    output = io.StringIO()
    async with running_router([FakeWorker(Role.DECODE)]) as first, running_router([wrong]) as second:
        code = await asyncio.to_thread(
            run, first.url, second.url, options=OPTIONS, console=Console(file=output, width=200)
        )
    assert code == 1
    assert "prompt 0: 1 tokens, greedy, output position 2" in output.getvalue()
    assert output.getvalue().count("bec") + output.getvalue().count("bed") >= 2, "both logprobs in hexadecimal"


async def test_recorded_answers_are_a_reference(tmp_path: Path) -> None:
    path = tmp_path / "recorded.json"
    worker = FakeWorker(Role.DECODE)
    async with running_router([worker]) as router:
        assert (await verify(router.url, None, OPTIONS, record=path)).is_equal
        assert (await verify(router.url, None, OPTIONS, against=path)).is_equal
        worker.flips_bit_at = 0
        report = await verify(router.url, None, OPTIONS, against=path)
    assert report.difference is not None
    assert report.difference.position == 0
    assert report.cells[0].num_mismatches == 24


async def test_a_url_that_does_not_answer_is_named() -> None:
    with pytest.raises(ConfigError, match=r"http://127\.0\.0\.1:1/v1/models cannot be reached"):
        await verify("http://127.0.0.1:1", None, OPTIONS)
    with pytest.raises(ConfigError, match="nothing to compare with"):
        run("http://127.0.0.1:1")
