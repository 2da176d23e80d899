"""Topology planning: pure, complete, and refusing what cannot be."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import pytest
from rich.console import Console

from cluster.config import ClusterConfig, load_config
from cluster.errors import ConfigError
from cluster.launch.cores import usable_cores
from cluster.launch.topology import Topology, plan_topology, with_ports
from cluster.launch.topology_table import topology_table
from cluster.types import Role


def configured(**keys: object) -> ClusterConfig:
    return load_config(overrides=[("test", key.replace("__", "."), str(value)) for key, value in keys.items()])


def planned(num_cores: int = 8, **keys: object) -> Topology:
    return plan_topology(configured(**keys), num_cores)


def threads(topology: Topology) -> list[int]:
    return [rank.num_threads for group in topology.groups for rank in group.ranks]


def test_one_group_per_replica() -> None:
    topology = planned(prefill__replicas=2, decode__replicas=3)
    assert [group.name for group in topology.groups] == ["prefill-0", "prefill-1", "decode-0", "decode-1", "decode-2"]
    assert [group.role for group in topology.of_role(Role.DECODE)] == [Role.DECODE] * 3
    assert topology.num_processes == 6
    assert topology.summary == "2 prefill workers, 3 decode workers"


def test_monolithic_is_one_process_with_all_cores() -> None:
    topology = planned(monolithic="true", num_cores=6)
    assert topology.num_processes == 1
    assert [group.role for group in topology.groups] == [Role.DECODE]
    assert threads(topology) == [6]


def test_shared_cores_go_to_each_pool_and_split_cores_to_one_worker_only() -> None:
    assert threads(planned(8, prefill__replicas=2, decode__replicas=1)) == [4, 4, 8]
    assert threads(planned(8, prefill__replicas=2, decode__replicas=1, launch__cpu_threads="split")) == [2, 2, 2]
    assert threads(planned(1, prefill__replicas=2, decode__replicas=2, launch__cpu_threads="split")) == [1] * 4
    assert threads(planned(8, decode__engine__num_threads=3)) == [8, 3]


def test_ports_count_up_or_are_chosen() -> None:
    topology = planned(prefill__port=7000, prefill__replicas=2, router__port=0)
    ports = itertools.count(40_000)
    topology = with_ports(topology, lambda host: next(ports))
    assert [group.port for group in topology.groups] == [7000, 7001, 40_001]
    assert topology.router.url == "http://127.0.0.1:40000"
    assert topology.groups[0].address == "127.0.0.1:7000"


@pytest.mark.parametrize(
    ("host", "url"), [("0.0.0.0", "http://127.0.0.1:8000"), ("::1", "http://[::1]:8000"), ("::", "http://[::1]:8000")]
)
def test_the_url_is_one_that_can_be_reached(host: str, url: str) -> None:
    assert planned(router__host=host).router.url == url


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"connector.transport": "loopback"}, "connector.transport: loopback works inside one process only"),
        ({"monolithic": "true", "decode.replicas": "2"}, "decode.replicas: 2 workers do not fit `monolithic: true`"),
        ({"monolithic": "true", "prefill.replicas": "2"}, "prefill.replicas: 2 workers do not fit"),
        ({"decode.port": "65530", "decode.replicas": "10"}, "would need port 65539"),
        ({"decode.port": "8000"}, "router and decode-0 would both listen on port 8000"),
        ({"decode.port": "7001", "prefill.port": "7000", "prefill.replicas": "2"}, "prefill-1 and decode-0 would both"),
        (
            {"prefill.engine.max_model_len": "2048", "decode.engine.max_model_len": "1024"},
            "prefill.engine.max_model_len (2048) is larger than decode.engine.max_model_len (1024)",
        ),
    ],
)
def test_impossible_topologies_are_refused_by_name(keys: dict[str, str], expected: str) -> None:
    config = load_config(overrides=[("test", key, text) for key, text in keys.items()])
    with pytest.raises(ConfigError) as caught:
        plan_topology(config, 4)
    assert expected in caught.value.message


def test_loopback_is_allowed_inside_one_process() -> None:
    assert planned(monolithic="true", connector__transport="loopback").is_monolithic


def test_the_table_shows_every_process() -> None:
    out = io.StringIO()
    topology = planned(prefill__replicas=2, decode__port=7000)
    Console(file=out, width=120).print(topology_table(topology, configured()))
    for word in ("router", "prefill-0", "prefill-1", "decode-0", "127.0.0.1:8000", "127.0.0.1:7000", "nixl"):
        assert word in out.getvalue()


@pytest.mark.parametrize(("quota", "limit"), [("max 100000", 10**6), ("50000 100000", 1), ("nonsense", 10**6)])
def test_usable_cores_heed_the_control_group(tmp_path: Path, quota: str, limit: int) -> None:
    cpu_max = tmp_path / "cpu.max"
    cpu_max.write_text(quota)
    assert 1 <= usable_cores(cpu_max) <= limit
    assert usable_cores(tmp_path / "missing") >= 1
