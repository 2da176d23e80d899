"""All GPU records and tests of one machine, spread over its GPUs, within a time limit.

    python -m benchmarks.gpu.everything --out DIR [--deadline 560] [--only engine fp8 tests ...]
        [--peer "python3 peer.py --mixed 512 --out {out}"] [--peer-fp8 "python3 peer.py --fp8 --mixed 512 --out {out}"]

Kernels are compiled first, by many processes. What is timed then has a GPU to itself, one chain of commands after the
other; a peer runs on the GPU that its comparison runs on. Tests and exactness share the GPUs when these are free. Every
command writes DIR/NAME.log, records are appended in DIR/records; what the deadline cuts off is named at the end.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu.record_exactness import MODELS

PYTHON = sys.executable
COMPILE_SHARES = max(6, (os.cpu_count() or 1) // 5)  # processes per model
TESTS = ("attention", "mla", "linear", "fp8", "fp8_chains", "moe", "small_ops", "admission", "engine", "demo_model")
END_S = 10.0  # for a command to end after an interrupt: what it has by then is recorded


@dataclass(frozen=True)
class Command:
    name: str
    words: tuple[str, ...]
    limit_s: float
    needs_peer_path: bool = False  # a peer must not see our packages


@dataclass(frozen=True)
class Chain:
    """Commands one after the other on one GPU."""

    group: str
    commands: tuple[Command, ...]

    @property
    def limit_s(self) -> float:
        return sum(command.limit_s for command in self.commands)


@dataclass
class Run:
    """What has happened so far."""

    out: Path
    deadline_s: float  # on the monotonic clock
    start_s: float = field(default_factory=time.monotonic)
    notes: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def say(self, text: str) -> None:
        with self._lock:
            print(f"[{time.monotonic() - self.start_s:5.0f} s] {text}", flush=True)

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.say(text)

    def execute(self, command: Command, gpu: str) -> bool:
        left_s = min(command.limit_s, self.deadline_s - time.monotonic())
        if self.deadline_s - time.monotonic() <= END_S:
            self.note(f"NOT RUN {command.name}: the time is over")
            return False
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
        if command.needs_peer_path:
            environment["PYTHONPATH"] = os.environ.get("PEER_PYTHONPATH", "")
        start_s, file = time.monotonic(), self.out / f"{command.name}.log"
        with file.open("wb") as log:
            process = subprocess.Popen(
                command.words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True,
            )  # fmt: skip
            code = _wait(process, left_s)
        took = f"{command.name} in {time.monotonic() - start_s:.0f} s"
        if code == 0:
            self.say(f"{took}: {_last_line(file)}")
        else:
            self.note(f"FAILED {took}: {'cut off' if code is None else f'exit code {code}'}; {_last_line(file)}")
        return code == 0


def _wait(process: subprocess.Popen[bytes], limit_s: float) -> int | None:
    """The exit code; None if it was cut off."""
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return None


def _last_line(file: Path) -> str:
    lines = file.read_text(errors="replace").strip().splitlines()
    return lines[-1][:160] if lines else ""


def bench(name: str, limit_s: float, *words: str, out: Path) -> Command:
    command = (PYTHON, "-m", "benchmarks.gpu", *words, "--out", str(out / "records"))
    return Command(name, command, limit_s)


def compile_commands() -> list[Command]:
    shares = [(str(share), str(COMPILE_SHARES)) for share in range(COMPILE_SHARES)]
    return [
        Command(
            f"compile-{model}-{share}",
            (PYTHON, "-m", "benchmarks.gpu", "compile-engine", share, of, "--model", model),
            150.0,
        )
        for model in ("llama", "llama-fp8")
        for share, of in shares
    ]


def timed_chains(out: Path, peer: str | None, peer_fp8: str | None) -> list[Chain]:
    """Longest first."""
    bf16 = [] if peer is None else [_peer("peer", peer, out)]
    fp8 = [] if peer_fp8 is None else [_peer("peer-fp8", peer_fp8, out)]
    engine_file = ["--peer", str(out / "peer.jsonl")] if bf16 else []
    fp8_file = ["--peer", str(out / "peer-fp8.jsonl")] if fp8 else []
    load = ("--rate", "8", "22", "--duration", "12", "--chunks", "8192", "--shares", "40", "60", "80")
    split = (PYTHON, "-m", "benchmarks.gpu.split", *load, "--out", str(out / "records"))
    speculation = (PYTHON, "-m", "benchmarks.speculation", "--device", "cuda", "--model", "llama-8b", "--budget", "60")
    return [
        Chain("engine", (*bf16, bench("engine", 200, "engine", *engine_file, out=out), _defaults(out))),
        Chain("fp8", (*fp8, bench("engine-fp8", 190, "engine-fp8", *fp8_file, out=out))),
        Chain("split", (Command("split", split, 540.0),)),
        Chain("speculation", (Command("speculation", (*speculation, "--out", str(out / "records")), 110.0),)),
        Chain("attention", (bench("attention", 60, "attention", out=out),)),
        Chain("gemm", (bench("gemm", 150, "gemm", out=out), _tune(out))),
        Chain("graphs", _graphs()),
        Chain("rope", (Command("rope-attention", (PYTHON, "-m", "benchmarks.gpu.rope_attention"), 300.0),)),
        Chain("steps", _steps(out)),
        Chain("plans", _plans(out)),
        Chain("profile", (Command("profile", (PYTHON, "-m", "benchmarks.gpu", "engine-profile"), 150.0),)),
    ]


def _defaults(out: Path) -> Command:
    return bench("engine-defaults", 90, "engine-defaults", "--ours", str(out / "records"), out=out)


def _tune(out: Path) -> Command:
    """A whole model, from the plans that are known: it is to take a minute."""
    words = (PYTHON, "-m", "benchmarks.gpu.tune_rows", "--known", "--budget", "60", "--out", str(out / "plans.json"))
    return Command("tune", words, 120.0)


def _graphs() -> tuple[Command, ...]:
    """Steps with prompts as graphs, on and off; what their launches cost where they are none."""
    compare = ("engine-profile", "--only", "mixed", "--graph-prompt-rows", "0", "1536")
    return (
        Command("prompt-graphs", (PYTHON, "-m", "benchmarks.gpu", *compare), 260.0),
        Command("host-launch", (PYTHON, "-m", "benchmarks.gpu.host_launch"), 60.0),
    )


def _steps(out: Path) -> tuple[Command, ...]:
    """What a decode step takes at each size, and whether other plans make it shorter."""
    tune = (PYTHON, "-m", "benchmarks.gpu.tune_step", "--rows", "1", "64", "128", "256", "--budget", "150")
    return (
        Command("step-sizes", (PYTHON, "-m", "benchmarks.gpu.step_sizes"), 90.0),
        Command("tune-step", (*tune, "--out", str(out / "step-plans.json")), 260.0),
    )


def _plans(out: Path) -> tuple[Command, ...]:
    """Kernels that no table names yet, under sustained load; the first writes a table of FP8 plans to DIR/fp8-plans."""
    sustained = (PYTHON, "-m", "benchmarks.gpu.sustained", "--out")
    few_rows = ("--layers", "8b.gate_up_silu", "--rows", "256", "512", "1024", "2048", "--budget", "80")
    return (
        Command("sustained-fp8", (*sustained, str(out / "fp8-plans"), "--fp8", "--budget", "120"), 160.0),
        Command("sustained", (*sustained, str(out / "sustained.jsonl"), *few_rows), 110.0),
        Command("fp8-chains", (PYTHON, "-m", "benchmarks.gpu", "fp8-chains"), 150.0),
    )


def _peer(name: str, command: str, out: Path) -> Command:
    words = tuple(shlex.split(command.replace("{out}", str((out / f"{name}.jsonl").resolve()))))
    return Command(name, words, 240.0, needs_peer_path=True)


def shared_commands(out: Path) -> list[tuple[str, Command]]:
    """(group, command): several on a GPU at once."""
    pytest = (PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    exactness = [
        ("exactness", bench(f"exactness-{model}", 200, "exactness", "--model", model, "--budget", "150", out=out))
        for model in MODELS
    ]
    tests = [("tests", Command(f"test-{name}", (*pytest, f"tests/gpu/test_{name}.py"), 260.0)) for name in TESTS]
    return [*exactness, *tests]


def work_off(run: Run, gpu: str, chains: deque[Chain]) -> None:
    while True:
        try:
            chain = chains.popleft()
        except IndexError:
            return
        for command in chain.commands:
            run.execute(command, gpu)


def together(run: Run, commands: Sequence[Command], gpus: Sequence[str]) -> None:
    threads = [
        threading.Thread(target=run.execute, args=(command, gpus[index % len(gpus)]))
        for index, command in enumerate(commands)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.everything", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="a directory for logs and records")
    parser.add_argument("--deadline", type=float, default=560.0, help="seconds for everything")
    parser.add_argument("--gpus", default="0", help="numbers, as in 0,1")
    parser.add_argument(
        "--only",
        nargs="*",
        help="groups: engine fp8 split speculation attention gemm graphs rope steps plans profile exactness tests",
    )
    parser.add_argument("--peer", help="a command that writes the peer's JSON lines to {out}")
    parser.add_argument("--peer-fp8", help="the same with FP8")
    parser.add_argument("--no-compile", action="store_true", help="the kernels are in Triton's cache")
    options = parser.parse_args()
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    gpus = options.gpus.split(",")
    run = Run(out, time.monotonic() + options.deadline)
    is_wanted = (lambda group: True) if options.only is None else (lambda group: group in options.only)
    if not options.no_compile:
        together(run, compile_commands(), gpus)
    chains = [chain for chain in timed_chains(out, options.peer, options.peer_fp8) if is_wanted(chain.group)]
    queue = deque(chains)
    workers = [threading.Thread(target=work_off, args=(run, gpu, queue)) for gpu in gpus]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    together(run, [command for group, command in shared_commands(out) if is_wanted(group)], gpus)
    for note in run.notes:
        print(note)
    return 1 if run.notes else 0


if __name__ == "__main__":
    sys.exit(main())
