"""The exactness matrix: the same bits in every topology, chunk size, concurrency and cache state.

    {monolithic, 1P+1D, 2P+2D} x {chunk 64, 97, 512} x {1, 8, 32 in flight} x {cold, warm prefix cache}

Each cell sends the prompts of `cluster verify` (lengths around every block, chunk and split boundary,
greedy and sampled) and compares token ids and the bits of all logprobs with the reference: one process,
chunk 512, one request at a time, cold. Then the digests of the KV that every worker, prefill and decode,
still has of each prompt are compared, too (and every hand-over has checked its own).

    python -m benchmarks.exactness [--quick] [--speculation ngram] [--break MUTATION] [--dry-run]

`--break` runs with a kernel whose order is wrong on purpose: then cells must differ, or the matrix
proves nothing. With `--speculation` every deployment but the first, the reference's, speculates. Exit code:
0 if all cells are equal (with --break: if some are not).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from benchmarks.accounting import assert_settled, kv_digests, worker_addresses
from benchmarks.deployment import Deployment, deployment
from benchmarks.results import Parameter, append_result
from cluster.verify.comparison import Difference, compare
from cluster.verify.model import Case, Output, VerifyOptions
from cluster.verify.side import Side, built_in_cases

TOPOLOGIES = {"monolithic": (0, 0), "1P+1D": (1, 1), "2P+2D": (2, 2)}
CHUNKS = (512, 97, 64)  # the first is the reference's
CONCURRENCIES = (1, 8, 32)
POOL_BYTES = 256 << 20
NUM_TOP_LOGPROBS = 5
REQUEST_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Matrix:
    """What is run: on each deployment every concurrency, cold and warm. The first cell is the reference."""

    deployments: Sequence[tuple[str, int]]  # (topology, chunk)
    concurrencies: Sequence[int]
    num_prompts: int
    max_tokens: int


FULL = Matrix(tuple(itertools.product(TOPOLOGIES, CHUNKS)), CONCURRENCIES, num_prompts=64, max_tokens=16)
QUICK = Matrix((("monolithic", 512), ("1P+1D", 97), ("2P+2D", 64)), (8,), num_prompts=24, max_tokens=8)
# One process is enough to show that a wrong order shows: alone against eight at a time.
BROKEN = Matrix((("monolithic", 512),), (1, 8), num_prompts=24, max_tokens=8)


@dataclass(frozen=True, slots=True)
class CellResult:
    topology: str
    chunk: int
    concurrency: int
    is_warm: bool
    differences: list[Difference]


@dataclass(frozen=True, slots=True)
class KVResult:
    """Digests of one deployment compared with those of the first that had the same tokens cached."""

    topology: str
    chunk: int
    num_compared: int
    num_different: int


@dataclass(frozen=True, slots=True)
class Results:
    cells: list[CellResult]
    kv: list[KVResult]


class Reference:
    """The answers of the first cell."""

    def __init__(self, matrix: Matrix) -> None:
        self._options = VerifyOptions(num_prompts=matrix.num_prompts, max_tokens=matrix.max_tokens)
        self.cases: tuple[Case, ...] | None = None
        self.outputs: tuple[Output, ...] | None = None
        self._digests: dict[tuple[int, ...], tuple[int, ...]] = {}  # cached tokens -> digests per KV head

    async def compare(self, side: Side, concurrency: int, cache_salt: str) -> list[Difference]:
        if self.cases is None:
            self.cases = await built_in_cases([side], self._options)
        outputs = await side.generate(self.cases, concurrency, NUM_TOP_LOGPROBS, cache_salt=cache_salt)
        if self.outputs is None:
            _refuse_blind_data(outputs)
            self.outputs = outputs
        return compare(self.cases, self.outputs, outputs)

    async def compare_kv(self, running: Deployment, topology: str, chunk: int, cache_salt: str) -> KVResult:
        assert self.cases is not None
        num_compared = num_different = 0
        for address in worker_addresses(running).values():
            for case in self.cases:
                num_tokens, digests = await kv_digests(address, case.prompt, cache_salt)
                if num_tokens:
                    known = self._digests.setdefault(case.prompt[:num_tokens], digests)
                    num_compared += 1
                    num_different += known != digests
        return KVResult(topology, chunk, num_compared, num_different)


def _refuse_blind_data(outputs: Sequence[Output]) -> None:
    """Answers that hardly differ from each other could not show a difference between topologies."""
    bits = {bits for output in outputs for bits in output.logprob_bits}
    tokens = {token_id for output in outputs for token_id in output.token_ids}
    assert len(bits) > 4 * len(outputs), "the logprobs repeat themselves: the data would not reveal a difference"
    assert len(tokens) > 20, "the answers are all alike: the data would not reveal a difference"


def run_matrix(
    model: str, matrix: Matrix, environment: dict[str, str] | None = None, speculation: str = "none"
) -> Results:
    """One deployment per (topology, chunk), all cells of it, and its block accounting afterwards."""
    reference = Reference(matrix)
    results = Results([], [])
    for index, (topology, chunk) in enumerate(matrix.deployments):
        settings = _settings(topology, chunk)
        settings.append(f"decode.engine.speculation.method={speculation if index else 'none'}")
        with deployment(model, settings, environment=environment) as running:
            asyncio.run(_run_cells(running, topology, chunk, matrix, reference, results))
            assert_settled(running)
    return results


async def _run_cells(
    running: Deployment, topology: str, chunk: int, matrix: Matrix, reference: Reference, results: Results
) -> None:
    limits = httpx.Limits(max_connections=max(matrix.concurrencies))
    async with httpx.AsyncClient(timeout=REQUEST_TIMEOUT_S, limits=limits, trust_env=False) as client:
        side = await Side.open(client, running.url)
        for concurrency in matrix.concurrencies:
            salt = uuid.uuid4().hex  # nobody has used it: the prefix cache is cold
            for is_warm in (False, True):
                differences = await reference.compare(side, concurrency, salt)
                results.cells.append(CellResult(topology, chunk, concurrency, is_warm, differences))
                _print_cell(results.cells[-1])
    results.kv.append(await reference.compare_kv(running, topology, chunk, salt))
    print(f"{topology:10} chunk {chunk:4} KV digests: {results.kv[-1]}", flush=True)


def _settings(topology: str, chunk: int) -> list[str]:
    num_prefill, num_decode = TOPOLOGIES[topology]
    engine = {"max_batched_tokens": chunk, "max_num_sequences": 32, "kv_cache_bytes": POOL_BYTES, "max_model_len": 2048}
    pools = ("decode",) if num_prefill == 0 else ("prefill", "decode")
    settings = [f"{pool}.engine.{key}={value}" for pool in pools for key, value in engine.items()]
    if num_prefill == 0:
        return [*settings, "monolithic=true"]
    return [*settings, f"prefill.replicas={num_prefill}", f"decode.replicas={num_decode}"]


def _print_cell(cell: CellResult) -> None:
    state = "warm" if cell.is_warm else "cold"
    verdict = "equal" if not cell.differences else f"{len(cell.differences)} PROMPTS DIFFER: {cell.differences[0]}"
    print(f"{cell.topology:10} chunk {cell.chunk:4} in flight {cell.concurrency:3} {state}: {verdict}", flush=True)


def main() -> int:
    arguments = _parse_arguments()
    matrix = BROKEN if arguments.mutation else QUICK if arguments.quick else FULL
    environment = {"TANDEM_BREAK_KERNEL": arguments.mutation} if arguments.mutation else None
    results = run_matrix(arguments.model, matrix, environment, arguments.speculation)
    mismatches = sum(bool(cell.differences) for cell in results.cells)
    num_compared = sum(kv.num_compared for kv in results.kv)
    kv_mismatches = sum(kv.num_different for kv in results.kv)
    print(
        f"{len(results.cells)} cells, {mismatches} with a difference; {num_compared} KV digests, {kv_mismatches} differ"
    )
    if arguments.mutation:
        return 0 if mismatches else 1
    if not arguments.dry_run:
        _record(arguments, matrix, len(results.cells), mismatches, num_compared, kv_mismatches)
    return 1 if mismatches or kv_mismatches else 0


def _record(
    arguments: argparse.Namespace,
    matrix: Matrix,
    cells: int,
    mismatches: int,
    num_compared: int,
    kv_mismatches: int,
) -> None:
    params: dict[str, Parameter] = {
        "model": arguments.model,
        "speculation": arguments.speculation,
        "prompts": matrix.num_prompts,
        "deployments": ", ".join(f"{topology} chunk {chunk}" for topology, chunk in matrix.deployments),
        "concurrencies": ",".join(map(str, matrix.concurrencies)),
    }
    append_result("exactness", "cells", cells, "cells", params)
    append_result("exactness", "mismatches", mismatches, "cells", params)
    append_result("exactness", "kv_digests", num_compared, "digests", params)
    append_result("exactness", "kv_digest_mismatches", kv_mismatches, "digests", params)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--quick", action="store_true", help="a small part of the matrix")
    parser.add_argument("--speculation", choices=("none", "ngram"), default="none")
    parser.add_argument("--break", dest="mutation", metavar="MUTATION", help="a kernel mutation; cells must differ")
    parser.add_argument("--dry-run", action="store_true", help="print only, write no result lines")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
