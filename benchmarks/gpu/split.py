"""Prefill and decode as two processes on one GPU against one process that does both, under the same load.

    python -m benchmarks.gpu.split --rate 8 16 --duration 25
    python -m benchmarks.gpu.split --a-gpu-each          where there are two: each pool has its own

Each deployment is started as a user starts it, gets the same open-loop load from `cluster bench`, and answers
the same prompts, whose tokens and logprob bits must be equal everywhere. What one process does comes first: the
others are recorded beside the one of these whose tokens come most evenly, as soon as they are measured.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import torch

from benchmarks.deployment import Deployment, DeploymentFailed, deployment
from benchmarks.gpu.random_model import LLAMA_8B
from benchmarks.model_directory import write_llama_directory
from benchmarks.results import append_result, processor_name
from cluster.bench.measure import PERCENTILES, Statistics, Summary
from cluster.bench.prompts import WORDS
from cluster.bench.result_file import read_result
from cluster.engine.models.config import ModelConfig

NUM_COMPARED = 12


class Variant(NamedTuple):
    name: str
    settings: tuple[str, ...]


def variants(shares: Sequence[int], chunks: Sequence[int], device: str, *, a_gpu_each: bool) -> list[Variant]:
    one_gpu = "cuda:0" if device == "cuda" else device  # also where several are visible
    shared = (f"prefill.engine.device={one_gpu}", f"decode.engine.device={one_gpu}")
    found = [
        Variant(f"monolithic, chunks of {chunk}", ("monolithic=true", f"decode.engine.max_batched_tokens={chunk}"))
        for chunk in chunks
    ]
    found += [Variant(f"split, prefill {share} %", (f"prefill.gpu_percent={share}", *shared)) for share in shares]
    if a_gpu_each:
        devices = ("prefill.engine.device=cuda:0", "decode.engine.device=cuda:1")
        found.append(Variant("split, a GPU each", devices))
    return found


class Measured(NamedTuple):
    name: str
    summary: Summary
    answers: list[Any]


def compared_answers(url: str) -> list[Any]:
    """Tokens and logprobs of some prompts, asked for at once."""
    answers = []
    with httpx.Client(base_url=url, timeout=120.0) as client:
        model = client.get("/v1/models").json()["data"][0]["id"]
        for index in range(NUM_COMPARED):
            words = [WORDS[(index * 37 + i * i) % len(WORDS)] for i in range(5 + 61 * index)]
            body = {
                "model": model, "prompt": " " + " ".join(words), "max_tokens": 24, "logprobs": 3, "seed": index,
                "temperature": 0.0 if index % 2 else 0.9, "ignore_eos": True,
            }  # fmt: skip
            reply = client.post("/v1/completions", json=body)
            reply.raise_for_status()
            choice = reply.json()["choices"][0]
            answers.append((choice["text"], choice["logprobs"]))
    return answers


def measure(
    variant: Variant, model: Path, device: str, loads: Mapping[float, Sequence[str]], more: Sequence[str]
) -> Iterator[tuple[float, Measured]]:
    """By rate, of one start."""
    engine = [f"{role}.engine.device={device}" for role in ("prefill", "decode")]
    with deployment(str(model), [*engine, *more, *variant.settings]) as running:
        try:
            answers = compared_answers(running.url)
            for rate, load in loads.items():
                with tempfile.TemporaryDirectory() as directory:
                    output = Path(directory) / "result.jsonl"
                    run_load(running, [*load, "--output", str(output)])
                    _, line = read_result(output)
                yield rate, Measured(variant.name, line.summary, answers)
        except KeyboardInterrupt:
            print(f"{variant.name} was interrupted:\n{running.log_tail()}", flush=True)
            raise
        for row in running.log.read_text(errors="replace").splitlines():
            if "warning" in row.lower():
                print(f"  {row.strip()[:300]}")


def run_load(running: Deployment, load: Sequence[str]) -> None:
    command = [sys.executable, "-m", "cluster", "bench", "run", running.url, *load]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise DeploymentFailed(
            f"the load ended with {done.returncode}: {done.stdout[-800:]} {done.stderr[-800:]}\n{running.log_tail()}"
        )


def show(measured: Measured, rate: float) -> None:
    s = measured.summary
    assert s.ttft is not None
    assert s.itl is not None
    print(
        f"{measured.name:32} {rate:g}/s   ttft p50 {_at(s.ttft, 50) * 1e3:8.1f} p99 {_at(s.ttft, 99) * 1e3:8.1f} ms   "
        f"itl p50 {_at(s.itl, 50) * 1e3:7.2f} p99 {_at(s.itl, 99) * 1e3:7.2f} ms   in {s.input_tokens_per_s:8.0f} out "
        f"{s.output_tokens_per_s:7.0f} tok/s   {s.num_requests} requests, {s.num_failed} failed",
        flush=True,
    )


class Recorder:
    """Appends what was measured, beside the baseline."""

    def __init__(self, device_name: str, params: dict[str, Any], out: Path) -> None:
        self._device_name, self._params, self._out = device_name, params, out
        self._baseline: Measured | None = None
        self._answers: list[Any] | None = None

    def add(self, measured: Measured) -> None:
        """A monolithic one may become the baseline of what follows; ratios need one."""
        if measured.name.startswith("monolithic") and (
            self._baseline is None or _itl_p99(measured) < _itl_p99(self._baseline)
        ):
            self._baseline = measured
        if self._answers is None:
            self._answers = measured.answers
        if self._baseline is None:
            return
        s = measured.summary
        same_bits = measured.answers == self._answers
        throughput = _tokens_per_s(measured) / _tokens_per_s(self._baseline)
        itl_p99 = _itl_p99(measured) / _itl_p99(self._baseline)
        details = {
            **self._params, "variant": measured.name, "baseline": self._baseline.name, "same_bits": same_bits,
            "failed": s.num_failed,
            "ttft_p50_ms": round(1e3 * _at(s.ttft, 50), 2) if s.ttft else None,
            "itl_p50_ms": round(1e3 * _at(s.itl, 50), 3) if s.itl else None,
            "itl_p99_ms": round(1e3 * _itl_p99(measured), 3),
        }  # fmt: skip
        for metric, value in (("throughput_ratio", throughput), ("itl_p99_ratio", itl_p99)):
            append_result("split_gpu", metric, value, "x", details, device=self._device_name, directory=self._out)
        of = f"of {self._baseline.name}, same bits: {same_bits}"
        print(f"  throughput {throughput:.3f}x, itl p99 {itl_p99:.3f}x {of}", flush=True)


def _tokens_per_s(measured: Measured) -> float:
    return measured.summary.input_tokens_per_s + measured.summary.output_tokens_per_s


def _at(statistics: Statistics, percent: float) -> float:
    return statistics.percentiles[PERCENTILES.index(percent)]


def _itl_p99(measured: Measured) -> float:
    assert measured.summary.itl is not None
    return _at(measured.summary.itl, 99)


def main(config: ModelConfig = LLAMA_8B) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.split", description=__doc__)
    parser.add_argument("--rate", type=float, nargs="+", default=[8.0], help="requests a second, one after the other")
    parser.add_argument("--duration", type=float, default=25.0, help="seconds")
    parser.add_argument("--shares", type=int, nargs="*", default=[40, 60, 80], help="percent of the GPU for prefill")
    parser.add_argument("--chunks", type=int, nargs="*", default=[8192, 1024], help="of the monolithic engine")
    parser.add_argument("--a-gpu-each", action="store_true", help="also prefill on cuda:0 and decode on cuda:1")
    parser.add_argument("--prompt-tokens", default="uniform:64:2048")
    parser.add_argument("--output-tokens", default="uniform:64:256")
    parser.add_argument("--model", type=Path, help="a directory; by default an 8B shape with random weights is made")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--set", action="append", default=[], help="more configuration, KEY=VALUE")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or a deployment would outlive a time limit
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        model = options.model or write_llama_directory(Path(directory) / "llama-8b", config, device=options.device)
        lengths = {"prompt_tokens": options.prompt_tokens, "output_tokens": options.output_tokens}
        timing = ("--duration", str(options.duration), "--warmup", "8")
        lengths_load = ("--prompt-tokens", options.prompt_tokens, "--output-tokens", options.output_tokens)
        loads = {
            rate: (*("--rate", str(rate), "--seed", str(seed)), *timing, *lengths_load)
            for seed, rate in enumerate(options.rate)  # or later loads would find their prompts in the prefix cache
        }
        device_name = torch.cuda.get_device_name() if options.device.startswith("cuda") else processor_name()
        recorders = {
            rate: Recorder(device_name, {"rate": rate, "duration_s": options.duration, **lengths}, options.out)
            for rate in loads
        }
        with contextlib.suppress(KeyboardInterrupt):  # what was measured by then is recorded
            for variant in variants(options.shares, options.chunks, options.device, a_gpu_each=options.a_gpu_each):
                try:
                    for rate, measured in measure(variant, model, options.device, loads, options.set):
                        show(measured, rate)
                        recorders[rate].add(measured)
                except (DeploymentFailed, subprocess.TimeoutExpired, httpx.HTTPError) as error:
                    print(f"{variant.name}: {error}", flush=True)


if __name__ == "__main__":
    main()
