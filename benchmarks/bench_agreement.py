"""Does `cluster bench` measure what guidellm measures? The same load on the same server, one after the other.

    python -m benchmarks.bench_agreement --guidellm /path/to/venv/bin/guidellm

guidellm has many dependencies of its own and is therefore not one of ours: `pip install 'guidellm>=0.8,<0.9'`
into a virtual environment. Rounds alternate between the two tools, so that a machine that slows down
slows both; what is compared are medians of all rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.deployment import deployment
from benchmarks.results import append_result
from cluster.bench.result_file import read_result
from cluster.model_files.source import resolve_model
from cluster.tokenizer import Tokenizer, write_tokenizer_directory

TOOL_TIMEOUT_S = 300.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guidellm", required=True, help="the guidellm command")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--dry-run", action="store_true", help="record nothing")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, deployment(options.model, []) as running:
        directory = Path(scratch)
        tokenizer = directory / "tokenizer"
        write_tokenizer_directory(Tokenizer.load(str(resolve_model(options.model).path)), tokenizer)
        ours: list[tuple[float, float]] = []
        theirs: list[tuple[float, float]] = []
        run_ours(options, running.url, directory, seed=0)  # a warm-up for the server
        for seed in range(1, options.rounds + 1):  # prompts that the prefix cache has not seen
            ours.append(run_ours(options, running.url, directory, seed=seed))
            theirs.append(run_guidellm(options, running.url, tokenizer, directory, seed=seed))
            print(f"ours {ours[-1]}, guidellm {theirs[-1]} (ttft ms, itl ms)", flush=True)
    version = subprocess.run([options.guidellm, "--version"], capture_output=True, text=True, check=True, timeout=60)
    for at, metric in enumerate(("ttft_ratio", "itl_ratio")):
        our_ms, their_ms = (statistics.median(run[at] for run in runs) for runs in (ours, theirs))
        parameters = {
            "tool": "guidellm",
            "tool_version": version.stdout.split()[-1],
            "ours_ms": our_ms,
            "theirs_ms": their_ms,
            "rounds": options.rounds,
            "requests": options.requests,
            "streams": options.streams,
            "prompt_tokens": options.prompt_tokens,
            "output_tokens": options.output_tokens,
            "model": options.model,
        }
        print(f"{metric}: {our_ms / their_ms:.3f} (ours {our_ms:.3f} ms, guidellm {their_ms:.3f} ms)")
        if not options.dry_run:
            append_result("bench_agreement", metric, our_ms / their_ms, "x", parameters)


def run_ours(options: argparse.Namespace, url: str, directory: Path, *, seed: int) -> tuple[float, float]:
    """Medians of the time to the first token and of the mean gap of a request, in milliseconds."""
    output = directory / "ours.jsonl"
    command = [sys.executable, "-m", "cluster", "bench", url, "--output", str(output), "--seed", str(seed)]
    command += ["--concurrency", str(options.streams), "--requests", str(options.requests)]
    command += ["--prompt-tokens", str(options.prompt_tokens), "--output-tokens", str(options.output_tokens)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=TOOL_TIMEOUT_S)
    summary = read_result(output)[1].summary
    assert summary.ttft is not None
    assert summary.tpot is not None
    return 1e3 * summary.ttft.median, 1e3 * summary.tpot.median


def run_guidellm(
    options: argparse.Namespace, url: str, tokenizer: Path, directory: Path, *, seed: int
) -> tuple[float, float]:
    """As `run_ours`; guidellm's inter-token latency is the mean gap of a request too."""
    output = directory / "guidellm.json"
    lengths = f"prompt_tokens={options.prompt_tokens},output_tokens={options.output_tokens}"
    command = [
        options.guidellm,
        "run",
        "--backend",
        f"kind=openai_http,target={url},model={options.model},request_format=/v1/completions",
    ]
    command += ["--tokenizer", f"kind=hf_auto,model={tokenizer}", "--data", f"kind=synthetic_text,{lengths}"]
    command += ["--profile", f"kind=concurrent,streams={options.streams}"]
    command += ["--seed", f"kind=static,value={seed}"]
    command += ["--constraint", f"kind=max_requests,count={options.requests}", "--output", f"kind=json,path={output}"]
    finished = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=TOOL_TIMEOUT_S,
        cwd=directory,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if finished.returncode != 0:
        raise RuntimeError(f"guidellm failed:\n{finished.stdout[-2000:]}\n{finished.stderr[-2000:]}")
    (report,) = json.loads(output.read_text())["benchmarks"]
    metrics: dict[str, Any] = report["metrics"]
    first = metrics["time_to_first_token_ms"]["successful"]["median"]
    return float(first), float(metrics["inter_token_latency_ms"]["successful"]["median"])


if __name__ == "__main__":
    main()
