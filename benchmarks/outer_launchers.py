"""Jobs of several ranks, each running `python -m cluster launch`, as torchrun, mpirun, srun or a LeaderWorkerSet
would start them: for the acceptance run and the integration tests.

`slurm-env`, `openmpi-env`, `mpich-env` and `lws-env` start the ranks themselves, with the variables that were seen
under the real launchers (Slurm 22.05, Open MPI 4.1, MPICH 4.0, LeaderWorkerSet's webhook). Nobody ends their ranks
when one has ended, so what ends them is ours.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.launch.ports import choose_free_port

RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID", "LWS_WORKER_INDEX")
FOREIGN_PREFIXES = ("OMPI_", "PMI", "SLURM_", "LWS_", "TORCHELASTIC_", "MASTER_", "MPI_")
FOREIGN_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
POLL_S = 0.1

Environment = dict[str, str]


def _slurm(rank: int, size: int, job: str) -> Environment:
    return {
        "SLURM_JOB_ID": job,
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NTASKS": str(size),
        "SLURM_STEP_NUM_TASKS": str(size),
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_NODELIST": socket.gethostname(),
        "SLURM_NODELIST": socket.gethostname(),
    }


def _openmpi(rank: int, size: int, job: str) -> Environment:
    return {
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_SIZE": str(size),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(size),
        "PMIX_NAMESPACE": job,
        "PMIX_RANK": str(rank),
    }


def _mpich(rank: int, size: int, job: str) -> Environment:
    return {
        "PMI_RANK": str(rank),
        "PMI_SIZE": str(size),
        "MPI_LOCALRANKID": str(rank),
        "MPI_LOCALNRANKS": str(size),
        "TANDEM_LAUNCH__RENDEZVOUS_PORT": job,
    }


def _lws(rank: int, size: int, job: str) -> Environment:
    return {
        "LWS_LEADER_ADDRESS": "localhost",
        "LWS_WORKER_INDEX": str(rank),
        "LWS_GROUP_SIZE": str(size),
        "TANDEM_LAUNCH__RENDEZVOUS_PORT": job,  # two pods of one host have their ports for themselves, we do not
    }


FAKES: Mapping[str, Callable[[int, int, str], Environment]] = {
    "slurm-env": _slurm,
    "openmpi-env": _openmpi,
    "mpich-env": _mpich,
    "lws-env": _lws,
}


def is_available(launcher: str) -> bool:
    """torchrun comes with torch; it is started as a module, whatever is on the PATH."""
    return launcher == "torchrun" or launcher in FAKES or shutil.which(launcher) is not None


@dataclass
class Job:
    """`outer`: the launcher's process, or all ranks where nobody but us starts them."""

    launcher: str
    num_ranks: int
    outer: list[subprocess.Popen[bytes]]
    log: Path  # what all ranks and the launcher have written so far

    @property
    def lines(self) -> list[str]:
        return self.log.read_text(errors="replace").splitlines()

    def log_tail(self, num_lines: int = 60) -> str:
        return "\n".join(self.lines[-num_lines:])

    def rank_pids(self) -> dict[int, int]:
        """rank -> process id, of those that run."""
        if self.launcher in FAKES:
            return {rank: process.pid for rank, process in enumerate(self.outer) if process.poll() is None}
        found = {}
        for pid in descendants([process.pid for process in self.outer]):
            if (rank := _rank_of(pid)) is not None:
                found[rank] = pid
        return found

    def drain(self) -> None:
        """As an operator would; to all ranks where there is no launcher, as srun and kubelets do."""
        number = signal.SIGUSR1 if self.launcher == "mpirun" else signal.SIGTERM  # after SIGTERM mpirun soon kills
        for process in self.outer:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self, timeout_s: float) -> list[int]:
        """Exit codes of the launcher, or of the ranks. Raises `subprocess.TimeoutExpired`."""
        deadline = time.monotonic() + timeout_s
        return [process.wait(max(0.0, deadline - time.monotonic())) for process in self.outer]

    def wait_for(self, text: str, timeout_s: float) -> str:
        """The first line that has `text`. Raises `AssertionError` with the end of the log."""
        deadline = time.monotonic() + timeout_s
        while True:
            if found := [line for line in self.lines if text in line]:
                return found[0]
            ended = [process.poll() for process in self.outer]
            assert None in ended, f"{text!r} never came, the job has ended with {ended}:\n{self.log_tail()}"
            assert time.monotonic() < deadline, f"{text!r} did not come in {timeout_s:g} s:\n{self.log_tail()}"
            time.sleep(POLL_S)


@contextlib.contextmanager
def running_job(
    launcher: str, num_ranks: int, arguments: Sequence[str], directory: Path, *, module: str = "cluster"
) -> Iterator[Job]:
    """`python -m MODULE ARGUMENTS` on every rank; whatever is left at the end is killed."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(FOREIGN_PREFIXES) and name not in FOREIGN_NAMES
    }
    environment |= {"XDG_RUNTIME_DIR": str(directory), "COLUMNS": "200"}
    log = directory / "log"
    with log.open("wb") as output:
        starts = _starts(launcher, num_ranks, module, arguments)
        outer = [
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**environment, **extra},
                start_new_session=True,
            )
            for command, extra in starts
        ]
    job = Job(launcher, num_ranks, outer, log)
    try:
        yield job
    finally:
        _kill(job)


def descendants(pids: Sequence[int]) -> list[int]:
    """Process ids of all processes below, not the given ones."""
    found: list[int] = []
    pending = list(pids)
    while pending:
        for task in Path(f"/proc/{pending.pop()}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                children = [int(pid) for pid in task.read_text().split()]
                found += children
                pending += children
    return found


def _starts(
    launcher: str, num_ranks: int, module: str, arguments: Sequence[str]
) -> list[tuple[list[str], Environment]]:
    words = ["-m", module, *arguments]
    match launcher:
        case "torchrun":
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
            return [([*command, str(num_ranks), *words], {})]
        case "mpirun":
            options = ["-n", str(num_ranks), "--oversubscribe", "--bind-to", "none"]
            if os.getuid() == 0:
                options.append("--allow-run-as-root")
            return [(["mpirun", *options, sys.executable, *words], {})]
        case _:
            make = FAKES[launcher]
            job = str(choose_free_port("127.0.0.1")) if launcher in ("mpich-env", "lws-env") else secrets.token_hex(4)
            command = [sys.executable, *words]
            return [(command, make(rank, num_ranks, job)) for rank in range(num_ranks)]


def _rank_of(pid: int) -> int | None:
    """Of a process that runs a rank; None for its children and for helpers of the launcher."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        variables = dict(
            entry.partition(b"=")[::2] for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if entry
        )
    except OSError:
        return None
    if b"launch" not in words or b"-m" not in words:
        return None
    values = (variables.get(name.encode()) for name in RANK_VARIABLES)
    return next((int(value) for value in values if value), None)


def _kill(job: Job) -> None:
    ranks = list(job.rank_pids().values())
    for process in job.outer:
        if process.poll() is None:
            process.kill()
        process.wait()
    for pid in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
