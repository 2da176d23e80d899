"""Which rank of an outer launcher this process is, from its environment. Pure.

    launcher   rank                 ranks                        where rank 0 runs
    torchrun   RANK                 WORLD_SIZE                   MASTER_ADDR
    openmpi    OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE         MASTER_ADDR, else the first node of a Slurm job
    mpich      PMI_RANK             PMI_SIZE                     the same; also Intel MPI
    slurm      SLURM_PROCID         SLURM_STEP_NUM_TASKS         the first node of the step
    lws        LWS_WORKER_INDEX     LWS_GROUP_SIZE               LWS_LEADER_ADDRESS

If all ranks are on one host, that is where rank 0 runs, whatever the variables say.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from cluster.addresses import is_loopback
from cluster.errors import ConfigError
from cluster.launch.external_parts import LOOPBACK

FIRST_PORT, NUM_PORTS = 20_000, 10_000  # below the ports that kernels give to outgoing connections
NUM_CANDIDATES = 8
MAX_WORLD = 1 << 16

# A process started by the launcher has all of these; a shell in its allocation or container lacks one of them,
# or is told that it is alone.
_SIGNS = {
    "torchrun": ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    "openmpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "mpich": ("PMI_RANK", "PMI_SIZE"),
    "slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),  # batch scripts and salloc have no step
    "lws": ("LWS_WORKER_INDEX", "LWS_GROUP_SIZE", "LWS_LEADER_ADDRESS"),
}
# These say that one rank was meant. Elsewhere a world of one is also what a shell in an allocation sees.
_SIGNS_OF_ONE = {"torchrun": "TORCHELASTIC_RUN_ID", "openmpi": "OMPI_COMM_WORLD_SIZE"}
_STARTERS = {
    "torchrun": "torchrun",
    "openmpi": "Open MPI's mpirun",
    "mpich": "mpiexec of MPICH or Intel MPI",
    "slurm": "srun",
    "lws": "a LeaderWorkerSet",
}


@dataclass(frozen=True, slots=True)
class Identity:
    """One rank of one job. `host`: where the others find rank 0. `job` tells jobs on one host apart."""

    launcher: str
    rank: int
    world_size: int
    host: str
    job: str

    @property
    def starter(self) -> str:
        """For messages: "torchrun", "srun"."""
        return _STARTERS[self.launcher]

    @property
    def is_local(self) -> bool:
        """All ranks are on one host."""
        return is_loopback(self.host)

    def ports(self, configured: int) -> tuple[int, ...]:
        """Where rank 0 may listen, in the order of trying; the same on every rank. 0: derived from the job."""
        if configured:
            return (configured,)
        candidates = (zlib.crc32(f"{self.job}#{index}".encode()) % NUM_PORTS for index in range(NUM_CANDIDATES))
        return tuple(FIRST_PORT + candidate for candidate in dict.fromkeys(candidates))


def read_identity(
    environment: Mapping[str, str], choice: str = "auto", rendezvous_host: str | None = None
) -> Identity | None:
    """None: no outer launcher has started this process. `choice` as in `launch.external`.

    Raises `ConfigError` when a launcher that was named, or is certain, has left out what is needed.
    """
    match choice:
        case "none":
            return None
        case "auto":
            identity = _found(environment)
        case _:
            identity = _read(choice, environment)
    if identity is None:
        return None
    if rendezvous_host:
        identity = replace(identity, host=rendezvous_host)
    if not identity.host:
        raise ConfigError(
            f"launch.rendezvous_host: {identity.starter} does not say where rank 0 of several hosts runs; set it, or "
            "hand MASTER_ADDR to all ranks (`mpirun -x MASTER_ADDR=node0 ...`)"
        )
    return replace(identity, host=LOOPBACK) if is_loopback(identity.host) else identity


def first_host(nodelist: str) -> str:
    """Of Slurm's short form: `gpu[007-010,12],login1` begins with `gpu007`."""
    without_ranges = re.sub(r"\[([0-9]+)[^\]]*\]", r"\1", nodelist)
    return without_ranges.partition(",")[0].strip()


def _found(environment: Mapping[str, str]) -> Identity | None:
    """The innermost launcher: torchrun and mpirun are themselves started by srun, and all of them in pods."""
    for launcher, signs in _SIGNS.items():
        if all(environment.get(sign) for sign in signs):
            identity = _read(launcher, environment)
            if identity.world_size > 1 or _SIGNS_OF_ONE.get(launcher, "") in environment:
                return identity
    return None


def _read(launcher: str, environment: Mapping[str, str]) -> Identity:
    identity = _READERS[launcher](_Variables(launcher, environment))
    if not 1 <= identity.world_size <= MAX_WORLD or not 0 <= identity.rank < identity.world_size:
        raise ConfigError(
            f"{identity.starter}: rank {identity.rank} of {identity.world_size} cannot be; unless it started this "
            "process, use --external none"
        )
    return identity


@dataclass(frozen=True, slots=True)
class _Variables:
    """The environment as one launcher's variables."""

    launcher: str
    environment: Mapping[str, str]

    def text(self, *names: str) -> str:
        """Of the first one that is set; empty if none is."""
        return next((self.environment[name] for name in names if self.environment.get(name)), "")

    def number(self, *names: str) -> int:
        text = self.text(*names)
        if not text:
            raise ConfigError(
                f"--external {self.launcher}: {' or '.join(names)} is not set, so {_STARTERS[self.launcher]} has not "
                "started this process; start it that way, or use --external none"
            )
        return self._as_number(text, names)

    def number_or_0(self, *names: str) -> int:
        text = self.text(*names)
        return self._as_number(text, names) if text else 0

    def _as_number(self, text: str, names: tuple[str, ...]) -> int:
        if not text.isascii() or not text.isdecimal() or len(text) > 9:
            raise ConfigError(
                f"{' or '.join(names)}: expected a number from {_STARTERS[self.launcher]}, got {text[:40]!r}; unless "
                "it started this process, use --external none"
            )
        return int(text)


def _torchrun(variables: _Variables) -> Identity:
    world_size = variables.number("WORLD_SIZE")
    num_local = variables.number_or_0("LOCAL_WORLD_SIZE")
    names = ("TORCHELASTIC_RUN_ID", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
    return Identity(
        launcher="torchrun",
        rank=variables.number("RANK"),
        world_size=world_size,
        host=_host(num_local == world_size, variables.text("MASTER_ADDR")),
        job="/".join(("torchrun", *(variables.text(name) for name in names))),
    )


def _openmpi(variables: _Variables) -> Identity:
    world_size = variables.number("OMPI_COMM_WORLD_SIZE")
    num_local = variables.number_or_0("OMPI_COMM_WORLD_LOCAL_SIZE")
    return Identity(
        launcher="openmpi",
        rank=variables.number("OMPI_COMM_WORLD_RANK", "PMIX_RANK"),
        world_size=world_size,
        host=_host(num_local == world_size, _named_host(variables)),
        job=f"openmpi/{variables.text('PMIX_NAMESPACE', 'OMPI_MCA_ess_base_jobid')}",
    )


def _mpich(variables: _Variables) -> Identity:
    """Tells no job: two of them on one host at the same time need `launch.rendezvous_port`."""
    world_size = variables.number("PMI_SIZE")
    num_local = variables.number_or_0("MPI_LOCALNRANKS")
    return Identity(
        launcher="mpich",
        rank=variables.number("PMI_RANK", "PMIX_RANK"),
        world_size=world_size,
        host=_host(num_local == world_size, _named_host(variables)),
        job=f"mpich/{variables.text('SLURM_JOB_ID')}",
    )


def _host(is_one_host: bool, elsewhere: str) -> str:
    return LOOPBACK if is_one_host else elsewhere


def _named_host(variables: _Variables) -> str:
    return variables.text("MASTER_ADDR") or first_host(variables.text("SLURM_JOB_NODELIST", "SLURM_NODELIST"))


def _slurm(variables: _Variables) -> Identity:
    nodelist = variables.text("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    num_nodes = variables.number_or_0("SLURM_STEP_NUM_NODES", "SLURM_JOB_NUM_NODES", "SLURM_NNODES")
    return Identity(
        launcher="slurm",
        rank=variables.number("SLURM_PROCID"),
        world_size=variables.number("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"),
        host=_host(num_nodes == 1, first_host(nodelist)),
        job=f"slurm/{variables.text('SLURM_JOB_ID', 'SLURM_JOBID')}.{variables.text('SLURM_STEP_ID', 'SLURM_STEPID')}",
    )


def _lws(variables: _Variables) -> Identity:
    return Identity(
        launcher="lws",
        rank=variables.number("LWS_WORKER_INDEX"),
        world_size=variables.number("LWS_GROUP_SIZE"),
        host=variables.text("LWS_LEADER_ADDRESS"),
        job="lws",  # a pod has its ports for itself
    )


_READERS: dict[str, Callable[[_Variables], Identity]] = {
    "torchrun": _torchrun,
    "openmpi": _openmpi,
    "mpich": _mpich,
    "slurm": _slurm,
    "lws": _lws,
}
