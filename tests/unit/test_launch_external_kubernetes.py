"""Pods of a LeaderWorkerSet: what the chart renders, and the manifest of docs/launch.md, fit what a rank reads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import yaml

from cluster.config import find_problems, load_config
from cluster.launch.external_identity import read_identity
from cluster.launch.external_parts import check_world
from cluster.launch.topology import plan_topology
from tests.helm_chart import ROOT, Manifest, changed, check_native, named, of_kind, read_values, render
from tests.helm_custom_resources import SCHEMAS

SEVERAL_PODS = changed(read_values("2p4d-tp4"), prefill__accelerator__count=1, decode__accelerator__count=2)


def pods_of(name: str, namespace: str, spec: Manifest, group: int) -> Iterator[dict[str, str]]:
    """Environments of one group's containers, as the project's controller and webhook make them: its variables
    come first, `subdomainPolicy: Shared` puts all pods under a headless service of the set's name."""
    assert spec["networkConfig"]["subdomainPolicy"] == "Shared"
    template = spec["leaderWorkerTemplate"]
    [container] = template["workerTemplate"]["spec"]["containers"]
    for index in range(template["size"]):
        injected = {
            "LWS_LEADER_ADDRESS": f"{name}-{group}.{name}.{namespace}",
            "LWS_GROUP_SIZE": str(template["size"]),
            "LWS_WORKER_INDEX": str(index),
        }
        given = {entry["name"]: entry.get("value", "from a field") for entry in container.get("env", [])}
        assert not injected.keys() & given.keys(), "the manifest sets what the controller sets"
        yield injected | given


@pytest.mark.parametrize(("role", "size"), [("prefill", 4), ("decode", 2)])
def test_the_pods_of_a_group_in_the_chart_are_its_ranks(role: str, size: int) -> None:
    manifests = render(SEVERAL_PODS)
    manifest = named(manifests, "LeaderWorkerSet", role)
    metadata, spec = manifest["metadata"], manifest["spec"]
    for group in (0, 1):
        identities = [read_identity(environment) for environment in pods_of(metadata["name"], "serving", spec, group)]
        assert [identity.rank for identity in identities if identity] == list(range(size))
        assert {identity.world_size for identity in identities if identity} == {size}
        assert {identity.host for identity in identities if identity} == {
            f"demo-tandem-{role}-{group}.demo-tandem-{role}.serving"
        }
    template = spec["leaderWorkerTemplate"]["workerTemplate"]
    [container] = template["spec"]["containers"]
    assert container["args"][:3] == ["python", "-m", role], "a pod of the chart runs a worker, no launch"
    assert "TANDEM_ADVERTISED_HOST" in {entry["name"] for entry in container["env"]}
    assert spec["leaderWorkerTemplate"]["restartPolicy"] == "RecreateGroupOnPodRestart"
    policy = named(manifests, "NetworkPolicy", role)["spec"]
    labels = template["metadata"]["labels"]
    assert any(reaches(rule["from"], rule["ports"], labels) for rule in policy["ingress"])
    assert any(reaches(rule.get("to", []), rule["ports"], labels) for rule in policy["egress"])


def reaches(peers: list[Manifest], ports: list[Manifest], labels: dict[str, str]) -> bool:
    """A pod with these labels, on every port of a rendezvous and of the collectives."""
    is_peer = any(peer["podSelector"]["matchLabels"].items() <= labels.items() for peer in peers)
    return is_peer and any(port.get("port") == 1 and port.get("endPort") == 65_535 for port in ports)


def test_groups_of_one_pod_are_no_ranks_of_anything() -> None:
    """Whoever runs `cluster launch` in such a pod means that pod."""
    manifests = render(read_values("2p4d-tp4"))
    for manifest in of_kind(manifests, "LeaderWorkerSet"):
        for environment in pods_of(manifest["metadata"]["name"], "serving", manifest["spec"], 0):
            assert environment["LWS_GROUP_SIZE"] == "1"
            assert read_identity(environment) is None


def test_the_groups_of_a_disaggregated_set_are_ranks_too() -> None:
    [manifest] = of_kind(render(read_values("wide-ep")), "DisaggregatedSet")
    sizes = {}
    for role in manifest["spec"]["roles"]:
        pods = list(pods_of(f"demo-{role['name']}", "serving", role["spec"], 0))
        identities = [read_identity(environment) for environment in pods]
        assert [identity.rank for identity in identities if identity] == list(range(len(pods)))
        sizes[role["name"]] = len(pods)
    assert sizes == {"prefill": 2, "decode": 4}


@pytest.fixture(scope="module")
def documented() -> dict[str, Any]:
    """The manifest of docs/launch.md by kind."""
    text = (ROOT / "docs" / "launch.md").read_text()
    [block] = [block for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if "kind: LeaderWorkerSet" in block]
    return {manifest["kind"]: manifest for manifest in yaml.safe_load_all(block)}


def test_the_documented_manifest_is_valid(documented: dict[str, Any]) -> None:
    for manifest in check_native(list(documented.values())):
        jsonschema.validate(manifest, SCHEMAS[manifest["apiVersion"], manifest["kind"]])
    service = documented["Service"]["spec"]
    assert service["selector"]["leaderworkerset.sigs.k8s.io/worker-index"] == "0", "only rank 0 has the router"


def test_the_documented_manifest_starts_as_many_ranks_as_its_configuration_means(
    documented: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("config") / "cluster.yaml"
    path.write_text(documented["ConfigMap"]["data"]["cluster.yaml"])
    config = load_config(path)
    assert list(find_problems(config)) == []
    spec = documented["LeaderWorkerSet"]["spec"]
    pods = list(pods_of("tandem", "serving", spec, 0))
    identities = [read_identity(pod, config.launch.external, config.launch.rendezvous_host) for pod in pods]
    for identity in identities:
        assert identity is not None
        assert not identity.is_local
        check_world(plan_topology(config, 2), config, identity.world_size, identity.starter)
    assert config.security.allow_plaintext_network
    assert config.launch.rendezvous_port, "a policy can name the port only if it is fixed"
    template = spec["leaderWorkerTemplate"]["workerTemplate"]["spec"]
    drain_s = config.launch.drain_timeout_s
    assert template["terminationGracePeriodSeconds"] >= 2 * drain_s + 25, "the router drains, then the workers"
