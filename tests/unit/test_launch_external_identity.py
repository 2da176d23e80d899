"""Which rank a process is: environments as real launchers made them, and those that must start nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import load_config
from cluster.errors import ConfigError
from cluster.launch.external_identity import FIRST_PORT, NUM_PORTS, Identity, first_host, read_identity

Environment = dict[str, str]

TORCHRUN = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_WORLD_SIZE": "1",
    "MASTER_ADDR": "gpu1.example.org",
    "MASTER_PORT": "46007",
    "TORCHELASTIC_RUN_ID": "aa198e87",
    "TORCHELASTIC_RESTART_COUNT": "0",
}
MPIRUN = {  # Open MPI 4.1.4
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_MCA_ess_base_jobid": "1879900161",
    "PMIX_NAMESPACE": "1879900161",
    "PMIX_RANK": "1",
}
MPICH = {  # hydra 4.0.2
    "PMI_RANK": "1",
    "PMI_SIZE": "4",
    "PMI_FD": "8",
    "MPI_LOCALRANKID": "1",
    "MPI_LOCALNRANKS": "4",
}
ALLOCATION = {  # Slurm 22.05: what a shell of `salloc -n3 -N2` sees
    "SLURM_JOB_ID": "3",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_NODELIST": "n[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS": "3",
    "SLURM_NPROCS": "3",
    "SLURM_TASKS_PER_NODE": "2,1",
}
BATCH = ALLOCATION | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_GTIDS": "0"}
STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "n[1-2]"}
SRUN = ALLOCATION | STEP | {"SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "3"}
INTERACTIVE = BATCH | {  # salloc with LaunchParameters=use_interactive_step
    "SLURM_STEP_ID": "4294967290",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NODELIST": "n1",
}
LWS = {"LWS_LEADER_ADDRESS": "tandem-0.tandem.serving", "LWS_WORKER_INDEX": "1", "LWS_GROUP_SIZE": "4"}


def changed(environment: Environment, **changes: str | None) -> Environment:
    return {name: value for name, value in (environment | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("environment", "launcher", "rank", "world_size", "host"),
    [
        (TORCHRUN, "torchrun", 1, 4, "127.0.0.1"),
        (changed(TORCHRUN, WORLD_SIZE="8"), "torchrun", 1, 8, "gpu1.example.org"),
        (MPIRUN, "openmpi", 1, 4, "127.0.0.1"),
        (MPIRUN | {"OMPI_COMM_WORLD_SIZE": "8", "MASTER_ADDR": "node7"}, "openmpi", 1, 8, "node7"),
        (MPIRUN | ALLOCATION | {"OMPI_COMM_WORLD_SIZE": "8"}, "openmpi", 1, 8, "n1"),
        (MPICH, "mpich", 1, 4, "127.0.0.1"),
        (SRUN, "slurm", 2, 3, "n1"),
        (changed(SRUN, SLURM_STEP_NUM_NODES="1"), "slurm", 2, 3, "127.0.0.1"),
        (LWS, "lws", 1, 4, "tandem-0.tandem.serving"),
    ],
)
def test_a_rank_knows_itself(environment: Environment, launcher: str, rank: int, world_size: int, host: str) -> None:
    for choice in ("auto", launcher):
        identity = read_identity(environment, choice)
        assert identity is not None
        assert (identity.launcher, identity.rank, identity.world_size) == (launcher, rank, world_size)
        assert identity.host == host
        assert identity.is_local == (host == "127.0.0.1")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        ALLOCATION,
        BATCH,
        INTERACTIVE,
        changed(SRUN, SLURM_STEP_NUM_TASKS="1", SLURM_PROCID="0"),  # srun --pty bash
        changed(MPICH, PMI_SIZE="1", PMI_RANK="0"),  # srun --mpi=pmi2 --pty bash
        changed(LWS, LWS_GROUP_SIZE="1", LWS_WORKER_INDEX="0"),
        {"RANK": "3"},
        {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "pod-0", "MASTER_PORT": "23456"},  # a training operator's pod
        {"LOCAL_RANK": "0"},
        {"OMPI_COMM_WORLD_SIZE": "4"},
        {"OMPI_MCA_btl": "^openib"},
        {"PMI_RANK": "2"},
        {"LWS_LEADER_ADDRESS": "tandem-0.tandem"},
        changed(TORCHRUN, TORCHELASTIC_RUN_ID=None, WORLD_SIZE="1", RANK="0"),  # an embedding trainer of one rank
        changed(TORCHRUN, MASTER_PORT=""),
    ],
)
def test_nothing_is_started_by_accident(environment: Environment) -> None:
    assert read_identity(environment) is None


@pytest.mark.parametrize(
    "environment",
    [
        changed(TORCHRUN, WORLD_SIZE="1", RANK="0"),
        changed(MPIRUN, OMPI_COMM_WORLD_SIZE="1", OMPI_COMM_WORLD_LOCAL_SIZE="1", OMPI_COMM_WORLD_RANK="0"),
    ],
)
def test_one_rank_of_torchrun_or_mpirun_is_meant(environment: Environment) -> None:
    identity = read_identity(environment)
    assert identity is not None
    assert identity.world_size == 1


def test_the_innermost_launcher_counts() -> None:
    everything = LWS | SRUN | MPICH | MPIRUN | TORCHRUN
    launchers = []
    for inner in (TORCHRUN, MPIRUN, MPICH, SRUN, LWS):
        identity = read_identity(everything)
        assert identity is not None
        launchers.append(identity.launcher)
        everything = {name: value for name, value in everything.items() if name not in inner}
    assert launchers == ["torchrun", "openmpi", "mpich", "slurm", "lws"]
    assert read_identity(everything) is None


@pytest.mark.parametrize("environment", [TORCHRUN, MPIRUN, MPICH, SRUN, LWS])
def test_none_means_none(environment: Environment) -> None:
    assert read_identity(environment, "none") is None


def test_a_launcher_by_name_needs_less() -> None:
    operator = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "pod-0", "MASTER_PORT": "23456"}
    assert read_identity(operator, "torchrun") == Identity("torchrun", 3, 4, "pod-0", "torchrun//23456/")
    batch = read_identity(BATCH, "slurm")
    assert batch is not None
    assert (batch.rank, batch.world_size) == (0, 3)


@pytest.mark.parametrize(
    ("environment", "choice", "expected"),
    [
        ({}, "torchrun", "--external torchrun: WORLD_SIZE is not set, so torchrun has not started this process"),
        ({}, "slurm", "SLURM_PROCID is not set"),
        ({}, "openmpi", "OMPI_COMM_WORLD_SIZE is not set"),
        ({}, "mpich", "PMI_SIZE is not set"),
        ({}, "lws", "LWS_WORKER_INDEX is not set"),
        (changed(TORCHRUN, RANK="one"), "auto", "RANK: expected a number from torchrun, got 'one'"),
        (changed(TORCHRUN, RANK="4"), "auto", "rank 4 of 4 cannot be"),
        (changed(TORCHRUN, WORLD_SIZE="0"), "torchrun", "rank 1 of 0 cannot be"),
        (changed(MPIRUN, OMPI_COMM_WORLD_SIZE="8"), "auto", "launch.rendezvous_host"),
    ],
)
def test_what_is_missing_or_wrong_is_named(environment: Environment, choice: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_identity(environment, choice)
    assert expected in caught.value.message


def test_a_host_in_the_configuration_wins() -> None:
    identity = read_identity(changed(MPIRUN, OMPI_COMM_WORLD_SIZE="8"), "auto", "10.0.0.7")
    assert identity is not None
    assert identity.host == "10.0.0.7"
    local = read_identity(SRUN, "auto", "localhost")
    assert local is not None
    assert local.host == "127.0.0.1"


def test_each_choice_of_the_configuration_is_known() -> None:
    for choice in ("auto", "none", "torchrun", "openmpi", "mpich", "slurm", "lws"):
        assert load_config(overrides=[("test", "launch.external", choice)]).launch.external == choice
    with pytest.raises(ConfigError, match=r"launch\.external"):
        load_config(overrides=[("test", "launch.external", "pbs")])


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("gpu[007-010,12],login1", "gpu007"),
        ("cpu3,gpu[1-4]", "cpu3"),
        ("rack[1-2]n[03,05]-ib", "rack1n03-ib"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_node_list(nodelist: str, first: str) -> None:
    assert first_host(nodelist) == first


def test_ranks_of_one_job_try_the_same_ports_and_jobs_try_different_ones() -> None:
    def ports(environment: Environment, rank: str, **changes: str) -> tuple[int, ...]:
        identity = read_identity(changed(environment, RANK=rank, **changes))
        assert identity is not None
        return identity.ports(0)

    first = ports(TORCHRUN, "0")
    assert first == ports(TORCHRUN, "3")
    assert len(set(first)) >= 7
    assert not set(first) & set(ports(TORCHRUN, "0", TORCHELASTIC_RESTART_COUNT="1"))
    assert Identity("slurm", 0, 4, "n1", "slurm/1.0").ports(29_555) == (29_555,)


@given(st.text(max_size=40))
def test_ports_are_below_those_of_outgoing_connections(job: str) -> None:
    assert all(FIRST_PORT <= port < FIRST_PORT + NUM_PORTS for port in Identity("lws", 0, 2, "h", job).ports(0))
