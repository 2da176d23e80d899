"""Which part of the topology a rank runs, on which device, with how many threads."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import ClusterConfig, load_config
from cluster.errors import ConfigError
from cluster.launch.external_facts import visible_gpus
from cluster.launch.external_parts import (
    Seat,
    check_hosts,
    check_world,
    config_differences,
    describe_parts,
    parts_of,
    place,
)
from cluster.launch.topology import Rank, Topology, plan_topology

HERE = Seat(host="a", address="", num_cores=8, cpus=frozenset(range(8)), num_gpus=0)
THERE = replace(HERE, host="b", address="10.0.0.2")


def configured(**keys: object) -> ClusterConfig:
    return load_config(overrides=[("test", key.replace("__", "."), str(value)) for key, value in keys.items()])


def planned(config: ClusterConfig) -> Topology:
    return plan_topology(config, num_cores=8)


def with_group_sizes(topology: Topology, size: int) -> Topology:
    """As tensor parallel groups will be."""
    ranks = tuple(Rank(index=index, device="cpu", num_threads=1) for index in range(size))
    return replace(topology, groups=tuple(replace(group, ranks=ranks) for group in topology.groups))


def test_rank_0_is_the_router_then_come_prefill_and_decode() -> None:
    topology = planned(configured(prefill__replicas=2, decode__replicas=1))
    parts = parts_of(topology)
    assert [(part.rank, part.name) for part in parts] == [
        (0, "router"),
        (1, "prefill-0"),
        (2, "prefill-1"),
        (3, "decode-0"),
    ]
    assert [part.group for part in parts] == [None, *topology.groups]
    assert describe_parts(topology) == "rank 0 router, ranks 1-2 prefill, rank 3 decode"


def test_ranks_of_a_group_are_neighbours() -> None:
    topology = with_group_sizes(planned(configured(prefill__replicas=1, decode__replicas=2)), 2)
    parts = parts_of(topology)
    assert [part.name for part in parts[1:]] == [
        *("prefill-0.0", "prefill-0.1"),
        *("decode-0.0", "decode-0.1", "decode-1.0", "decode-1.1"),
    ]
    assert [part.group_rank for part in parts[1:]] == [0, 1, 0, 1, 0, 1]
    assert len(parts) == topology.num_processes


def test_a_monolithic_topology_has_one_part() -> None:
    topology = planned(configured(monolithic="true"))
    assert [part.name for part in parts_of(topology)] == ["monolithic"]
    check_world(topology, configured(monolithic="true"), 1, "torchrun")


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 3))
def test_every_part_has_one_rank(prefill: int, decode: int, size: int) -> None:
    topology = with_group_sizes(planned(configured(prefill__replicas=prefill, decode__replicas=decode)), size)
    parts = parts_of(topology)
    assert [part.rank for part in parts] == list(range(1 + size * (prefill + decode)))
    assert len({part.name for part in parts}) == len(parts)


@pytest.mark.parametrize(
    ("world_size", "expected"),
    [
        (1, "torchrun started 1 rank, but this configuration means 4 ranks"),
        (1, "choose what fits 1: --monolithic."),
        (2, "nothing does: one prefill and one decode worker take 3 ranks, --monolithic takes 1"),
        (3, "Start 4, or choose what fits 3: --prefill 1 --decode 1."),
        (7, "--prefill 4 --decode 2."),
        (8, "rank 0 router, ranks 1-2 prefill, rank 3 decode"),
        (8, "--external none"),
    ],
)
def test_a_wrong_world_is_refused_with_the_numbers_and_what_fits(world_size: int, expected: str) -> None:
    config = configured(prefill__replicas=2)
    with pytest.raises(ConfigError) as caught:
        check_world(planned(config), config, world_size, "torchrun")
    assert expected in caught.value.message


@given(st.integers(1, 8), st.integers(1, 8), st.integers(3, 30))
def test_what_is_said_to_fit_does(prefill: int, decode: int, world_size: int) -> None:
    config = configured(prefill__replicas=prefill, decode__replicas=decode)
    if world_size == 1 + prefill + decode:
        check_world(planned(config), config, world_size, "srun")
        return
    with pytest.raises(ConfigError) as caught:
        check_world(planned(config), config, world_size, "srun")
    words = caught.value.message.split()
    fitting = {name: int(words[words.index(f"--{name}") + 1].rstrip(".")) for name in ("prefill", "decode")}
    assert 1 + sum(fitting.values()) == world_size


def test_what_fits_heeds_groups_of_several_ranks() -> None:
    config = configured(prefill__replicas=1, decode__replicas=1)
    topology = with_group_sizes(planned(config), 4)
    with pytest.raises(ConfigError, match="--prefill 2 --decode 2"):
        check_world(topology, config, 17, "srun")
    with pytest.raises(ConfigError, match="take 9 ranks"):
        check_world(topology, config, 12, "srun")


def threads(config: ClusterConfig, *seats: Seat) -> list[int]:
    placements = place(planned(config), config, seats, "")
    return [rank.num_threads for placement in placements.values() for rank in placement.group.ranks]


def test_ranks_of_one_host_share_its_cores() -> None:
    shared = configured(prefill__replicas=2)
    assert threads(shared, *[HERE] * 4) == [4, 4, 8]
    assert threads(configured(prefill__replicas=2, launch__cpu_threads="split"), *[HERE] * 4) == [2, 2, 2]
    assert threads(shared, HERE, HERE, THERE, THERE) == [8, 8, 8]
    assert threads(configured(prefill__replicas=2, decode__engine__num_threads=3), *[HERE] * 4) == [4, 4, 3]


def test_cores_that_a_launcher_has_given_to_one_rank_are_not_shared() -> None:
    bound = [replace(HERE, num_cores=2, cpus=frozenset({2 * rank, 2 * rank + 1})) for rank in range(4)]
    assert threads(configured(prefill__replicas=2, launch__cpu_threads="split"), *bound) == [2, 2, 2]


def devices(config: ClusterConfig, *seats: Seat) -> list[str]:
    placements = place(planned(config), config, seats, "")
    return [rank.device for placement in placements.values() for rank in placement.group.ranks]


def test_the_gpus_of_a_host_are_dealt_out_and_the_router_gets_none() -> None:
    cuda = configured(
        prefill__replicas=2, decode__replicas=2, prefill__engine__device="cuda", decode__engine__device="cuda"
    )
    four, one = replace(HERE, num_gpus=4), replace(HERE, num_gpus=1)
    there = replace(THERE, num_gpus=4)
    assert devices(cuda, *[four] * 5) == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert devices(cuda, four, four, four, there, there) == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert devices(cuda, *[one] * 5) == ["cuda:0"] * 4
    assert devices(cuda, *[HERE] * 5) == ["cuda"] * 4
    chosen = configured(prefill__replicas=2, prefill__engine__device="cuda:3", decode__engine__device="cpu")
    assert devices(chosen, *[four] * 4) == ["cuda:3", "cuda:3", "cpu"]
    first = configured(prefill__engine__device="cuda:0", decode__replicas=2, decode__engine__device="cuda")
    assert devices(first, *[replace(HERE, num_gpus=2)] * 4) == ["cuda:0", "cuda:1", "cuda:0"]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1,2"}, 3),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8932f937"}, 1),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, 0),
        ({"CUDA_VISIBLE_DEVICES": "1,-1,2"}, 1),
        ({}, 2),
    ],
)
def test_visible_gpus(variables: dict[str, str], expected: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    devices = tmp_path_factory.mktemp("dev")
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (devices / name).touch()
    assert visible_gpus(variables, devices) == expected


def reachable(config: ClusterConfig, leader_address: str, *seats: Seat) -> list[str]:
    return [placement.reachable.host for placement in place(planned(config), config, seats, leader_address).values()]


def test_a_worker_is_reached_where_its_host_is() -> None:
    everywhere = configured(prefill__host="0.0.0.0", decode__host="0.0.0.0", security__allow_plaintext_network="true")
    assert reachable(configured(), "", HERE, HERE, HERE) == ["127.0.0.1", "127.0.0.1"]
    assert reachable(everywhere, "", HERE, HERE, HERE) == ["127.0.0.1", "127.0.0.1"]
    assert reachable(everywhere, "10.0.0.1", HERE, HERE, THERE) == ["10.0.0.1", "10.0.0.2"]
    told = replace(THERE, advertised_host="192.168.7.7")
    assert reachable(everywhere, "10.0.0.1", HERE, HERE, told) == ["10.0.0.1", "192.168.7.7"]


def test_several_hosts_need_addresses_and_a_key() -> None:
    check_hosts([HERE, HERE, HERE], configured())
    with pytest.raises(ConfigError) as caught:
        check_hosts([HERE, HERE, THERE], configured())
    for part in (
        "the ranks are on 2 hosts (a, b at 10.0.0.2)",
        "prefill.host: 127.0.0.1 cannot be listened on by workers on several hosts; use 0.0.0.0",
        "decode.host",
        "security.cluster_key_file: workers on several hosts need one key",
        "security.send_key_over_network",
    ):
        assert part in caught.value.message
    everywhere = {"prefill__host": "0.0.0.0", "decode__host": "::", "security__allow_plaintext_network": "true"}
    check_hosts([HERE, THERE, THERE], configured(**everywhere, security__cluster_key_file="/run/key"))
    check_hosts([HERE, THERE, THERE], configured(**everywhere, security__send_key_over_network="true"))


def test_differences_are_named_with_both_values() -> None:
    ours = configured(prefill__replicas=2, security__cluster_key_file="/a")
    theirs = configured(prefill__replicas=1, decode__engine__block_size=64, security__cluster_key_file="/b")
    assert config_differences(ours, ours) == []
    assert config_differences(ours, theirs) == [
        "prefill.replicas is 1 there and 2 here",
        "decode.engine.block_size is 64 there and None here",
    ]
