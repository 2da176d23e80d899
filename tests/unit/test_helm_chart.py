"""The chart: what its values render to, and which values it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import helm_python
import jsonschema
import msgspec
import pytest
import yaml

from cluster.config import ClusterConfig, load_config
from cluster.control.worker_config import read_config
from cluster.engine.config import EngineConfig, SpeculationConfig
from cluster.errors import ConfigError
from cluster.launch.local import DRAIN_MARGIN_S
from cluster.launch.ray_plan import check_ray, placement_request
from cluster.launch.topology import plan_topology
from cluster.router.config import RouterConfig, check_config
from tests.helm_bad_values import BAD_VALUES
from tests.helm_chart import (
    CHART,
    ROOT,
    VALUES_FILES,
    Manifest,
    changed,
    check_native,
    lint_problems,
    named,
    of_kind,
    pod_templates,
    read_values,
    render,
)
from tests.helm_custom_resources import SCHEMAS

NAMES = [path.name.removesuffix("-values.yaml") for path in VALUES_FILES]
SINGLE_RANK = ["cpu-demo", "one-gpu"]
ON_RAY = ["kuberay"]  # one config for all, of `cluster launch`
every_file = pytest.mark.parametrize("name", NAMES)


@every_file
def test_lint(name: str) -> None:
    assert lint_problems(read_values(name)) == []


@every_file
def test_objects_are_valid(name: str) -> None:
    custom = check_native(render(read_values(name)))
    for manifest in custom:
        jsonschema.validate(manifest, SCHEMAS[manifest["apiVersion"], manifest["kind"]])


def test_every_kind_of_object_is_rendered_by_some_file() -> None:
    kinds = {manifest["kind"] for name in NAMES for manifest in render(read_values(name))}
    assert kinds >= {
        *("ConfigMap", "Deployment", "Service", "ServiceAccount", "NetworkPolicy", "PodDisruptionBudget"),
        *("LeaderWorkerSet", "DisaggregatedSet", "HorizontalPodAutoscaler", "ScaledObject"),
        *("PodMonitor", "InferencePool", "RayCluster"),
    }
    assert not kinds & {"ClusterRole", "ClusterRoleBinding", "Secret"}


@pytest.mark.parametrize(("changes", "reason"), BAD_VALUES, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_values_are_refused_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(helm_python.HelmError) as refusal:
        render(changed(read_values("cpu-demo"), **changes))
    assert reason in str(refusal.value)


def test_defaults_alone_are_refused() -> None:
    with pytest.raises(helm_python.HelmError, match="is not set"):
        render({})


@every_file
def test_pods_are_locked_down(name: str) -> None:
    templates = list(pod_templates(render(read_values(name))))
    assert [role for role, _ in templates].count("prefill") == 1
    assert {role for role, _ in templates} == {"router", "prefill", "decode"}
    for role, template in templates:
        spec = template["spec"]
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not [volume for volume in spec["volumes"] if "hostPath" in volume]
        mounts: dict[str, bool] = {}  # volume to "can be written"
        for container in spec["containers"]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"]["drop"] == ["ALL"]
            assert set(security["capabilities"].get("add", [])) <= {"IPC_LOCK"}
            assert not security.get("privileged")
            assert not [entry for entry in container["env"] if "secretKeyRef" in entry.get("valueFrom", {})]
            assert "memory" in container["resources"]["limits"]
            for mount in container["volumeMounts"]:
                mounts[mount["name"]] = mounts.get(mount["name"], False) or not mount.get("readOnly")
        assert set(mounts) == {volume["name"] for volume in spec["volumes"]}
        assert ("cluster-key" in mounts) == (role != "router" or name in ON_RAY)
        writable = {volume for volume, is_writable in mounts.items() if is_writable}
        assert writable <= {"tmp", "cache", "shm", *(["ray", "ray-tmp", "ray-cache"] if name in ON_RAY else [])}


@every_file
def test_every_role_has_its_policy_and_budget(name: str) -> None:
    manifests = render(read_values(name))
    for role in ("router", "prefill", "decode"):
        policy = named(manifests, "NetworkPolicy", role)["spec"]
        assert policy["policyTypes"] == ["Ingress", "Egress"]
        assert all("from" in rule for rule in policy["ingress"]) == (role != "router")
        labels = dict(pod_templates(manifests))[role]["metadata"]["labels"]
        budgets = [] if name in ON_RAY else [named(manifests, "PodDisruptionBudget", role)["spec"]["selector"]]
        for selector in (policy["podSelector"], *budgets):
            assert selector["matchLabels"].items() <= labels.items()


@every_file
def test_selectors_find_the_pods(name: str) -> None:
    manifests = render(read_values(name))
    pods = dict(pod_templates(manifests))
    for service in of_kind(manifests, "Service"):
        role = service["metadata"]["labels"]["app.kubernetes.io/component"]
        labels = pods[role]["metadata"]["labels"] | {
            "leaderworkerset.sigs.k8s.io/worker-index": "0"
        }  # set by its controller
        assert service["spec"]["selector"].items() <= labels.items()
        containers = pods[role]["spec"]["containers"]
        ports = {port["name"] for container in containers for port in container.get("ports", [])}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports


@pytest.mark.parametrize("name", SINGLE_RANK)
def test_configs_are_those_of_the_processes(name: str) -> None:
    manifests = render(read_values(name))
    check_config(_router_config(manifests))
    for role in ("prefill", "decode"):
        config = read_config(_config(manifests, role))
        assert config.allow_plaintext_network
        assert name != "one-gpu" or config.engine.kv_cache_bytes == {"prefill": 8 << 30, "decode": 16 << 30}[role]
        assert config.cluster_key_file == "/var/run/secrets/tandem/cluster-key"


def test_pods_listen_on_ipv6_where_asked(tmp_path: Path) -> None:
    manifests = render(changed(read_values("cpu-demo"), listenHost="::"))
    assert [json.loads(_config(manifests, role))["host"] for role in ("router", "prefill", "decode")] == ["::"] * 3
    on_ray = cluster_config(render(changed(read_values("kuberay"), listenHost="::")), tmp_path)
    assert on_ray.router.host == "::"


def test_the_quantization_reaches_the_workers(tmp_path: Path) -> None:
    for value, expected in (("", None), ("fp8", "fp8")):
        on_ray = cluster_config(render(changed(read_values("kuberay"), model__quantization=value)), tmp_path)
        assert on_ray.model.quantization == expected
        manifests = render(changed(read_values("cpu-demo"), model__quantization=value))
        configs = [read_config(_config(manifests, role)) for role in ("prefill", "decode")]
        assert [config.model_quantization for config in configs] == [expected, expected]


def test_a_rollout_has_the_time_that_its_pods_have() -> None:
    """By itself Kubernetes calls one failed after 600 s, in which a large model need not have loaded."""
    values = changed(read_values("cpu-demo"), prefill__startupSeconds=3000, decode__startupSeconds=1000)
    deadlines = {
        manifest["metadata"]["name"].rpartition("-")[2]: manifest["spec"]["progressDeadlineSeconds"]
        for manifest in render(values)
        if manifest["kind"] == "Deployment"
    }
    assert deadlines["router"] > 3000
    assert deadlines["prefill"] > 3000
    assert 1000 < deadlines["decode"] < 3000


@pytest.mark.parametrize(("value", "expected"), [("", None), ("float32", "float32"), ("bfloat16", "bfloat16")])
def test_the_type_of_the_residual_stream_reaches_the_workers(value: str, expected: str | None, tmp_path: Path) -> None:
    on_ray = cluster_config(render(changed(read_values("kuberay"), model__residualDtype=value)), tmp_path)
    assert on_ray.model.residual_dtype == expected
    manifests = render(changed(read_values("cpu-demo"), model__residualDtype=value))
    configs = [read_config(_config(manifests, role)) for role in ("prefill", "decode")]
    assert [config.model_residual_dtype for config in configs] == [expected, expected]


def test_the_format_of_logs_reaches_every_process(tmp_path: Path) -> None:
    manifests = render(changed(read_values("cpu-demo"), logging__format="json"))
    assert [json.loads(_config(manifests, role))["log_format"] for role in ("router", "prefill", "decode")] == [
        "json"
    ] * 3
    on_ray = cluster_config(render(changed(read_values("kuberay"), logging__format="json")), tmp_path)
    assert on_ray.logging.format == "json"


@pytest.mark.parametrize("name", sorted(set(NAMES) - {*SINGLE_RANK, *ON_RAY}))
def test_a_worker_refuses_the_config_of_a_group_of_ranks(name: str) -> None:
    manifests = render(read_values(name))
    check_config(_router_config(manifests))
    for role in ("prefill", "decode"):
        with pytest.raises(ConfigError, match="unknown field `parallel`"):
            read_config(_config(manifests, role))


def test_groups_of_ranks_become_groups_of_pods() -> None:
    [wide] = of_kind(render(read_values("wide-ep")), "DisaggregatedSet")
    sizes = {role["name"]: role["spec"]["leaderWorkerTemplate"]["size"] for role in wide["spec"]["roles"]}
    assert sizes == {"prefill": 2, "decode": 4}
    tensor_parallel = of_kind(render(read_values("2p4d-tp4")), "LeaderWorkerSet")
    assert [item["spec"]["leaderWorkerTemplate"]["size"] for item in tensor_parallel] == [1, 1]


def test_routers_find_workers_by_the_services_of_the_pools() -> None:
    manifests = render(changed(read_values("cpu-demo"), decode__replicas=3))
    config = _router_config(manifests)
    assert config.prefill == ("dns:demo-tandem-prefill-workers.serving.svc:9000",)
    assert config.decode == ("dns:demo-tandem-decode-workers.serving.svc:9000",)
    for role in ("prefill", "decode"):
        service = named(manifests, "Service", f"{role}-workers")["spec"]
        assert service["clusterIP"] == "None"
        assert not service.get("publishNotReadyAddresses"), "a worker that is not ready must not be found"
    assert not of_kind(manifests, "Role")
    assert not [role for role, template in pod_templates(manifests) if template["spec"]["automountServiceAccountToken"]]


def test_only_routers_may_read_endpoint_slices_and_nothing_else() -> None:
    manifests = render(read_values("2p4d-tp4"))
    assert _router_config(manifests).decode == ("kubernetes:serving/demo-tandem-decode-workers:9000",)
    [role] = of_kind(manifests, "Role")
    assert role["rules"] == [
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["get", "list", "watch"]}
    ]
    [binding] = of_kind(manifests, "RoleBinding")
    pods = dict(pod_templates(manifests))
    accounts = {role: template["spec"]["serviceAccountName"] for role, template in pods.items()}
    assert [subject["name"] for subject in binding["subjects"]] == [accounts["router"]]
    assert accounts["router"] not in (accounts["prefill"], accounts["decode"])
    with_token = [role for role, template in pods.items() if template["spec"]["automountServiceAccountToken"]]
    assert with_token == ["router"]


@pytest.mark.parametrize("name", ["2p4d-tp4", "wide-ep"])
def test_of_a_group_the_leader_is_the_worker(name: str) -> None:
    service = named(render(read_values(name)), "Service", "decode-workers")
    assert service["spec"]["selector"]["leaderworkerset.sigs.k8s.io/worker-index"] == "0"


def test_a_changed_config_restarts_the_pods_of_its_role_only() -> None:
    def checksums(values: dict[str, Any]) -> dict[str, str]:
        return {
            role: template["metadata"]["annotations"]["checksum/config"]
            for role, template in pod_templates(render(values))
        }

    values = read_values("cpu-demo")
    before, after = checksums(values), checksums(changed(values, decode__engine__max_num_sequences=7))
    assert [role for role in before if before[role] != after[role]] == ["decode"]


def test_resources_of_devices_are_equal_in_requests_and_limits() -> None:
    pods = dict(pod_templates(render(read_values("2p4d-tp4"))))
    resources = pods["decode"]["spec"]["containers"][0]["resources"]
    for kind in ("requests", "limits"):
        assert (resources[kind]["nvidia.com/gpu"], resources[kind]["rdma/hca"]) == (4, 1)
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pods["decode"]["spec"][
        "tolerations"
    ]
    shared = dict(pod_templates(render(read_values("one-gpu"))))
    claims = {role: shared[role]["spec"]["resourceClaims"][0]["resourceClaimName"] for role in ("prefill", "decode")}
    assert set(claims.values()) == {"tandem-gpu"}


def test_a_drain_does_not_look_like_death() -> None:
    values = changed(
        read_values("cpu-demo"), decode__drainTimeoutSeconds=300, decode__terminationGracePeriodSeconds=400
    )
    [container] = dict(pod_templates(render(values)))["decode"]["spec"]["containers"]
    liveness = container["livenessProbe"]
    assert liveness["periodSeconds"] * liveness["failureThreshold"] > 300


def test_on_ray_one_config_describes_the_whole_deployment(tmp_path: Path) -> None:
    config = cluster_config(render(read_values("kuberay")), tmp_path)
    check_ray(config)
    assert (config.prefill.replicas, config.decode.replicas) == (1, 2)
    assert config.decode.engine.kv_cache_bytes == 268435456
    assert config.launch.ray.decode_labels == {"tandem-pool": "decode"}
    assert config.security.cluster_key_file == "/var/run/secrets/tandem/cluster-key"
    hub = {"source": "huggingface", "huggingface": {"repository": "a/b", "revision": "a" * 40}}
    model = cluster_config(render(changed(read_values("kuberay"), model={**hub, "name": "m"})), tmp_path).model
    assert (model.path, model.revision, model.served_name) == ("a/b", "a" * 40, "m")


def test_on_ray_a_group_fits_one_pod_of_its_pool(tmp_path: Path) -> None:
    values = changed(
        read_values("kuberay"),
        decode__engine={"device": "cuda", "kv_cache_bytes": 1 << 30},
        decode__accelerator={"claim": "gpu"},
    )
    manifests = render(values)
    config = cluster_config(manifests, tmp_path)
    [ray] = of_kind(manifests, "RayCluster")
    for group in ray["spec"]["workerGroupSpecs"]:
        [planned] = [each for each in plan_topology(config, 1).groups if each.name == f"{group['groupName']}-0"]
        request = placement_request(config, planned)
        assert request.labels == group["labels"]
        params = group["rayStartParams"]
        assert request.bundles[0]["CPU"] == int(params["num-cpus"])
        assert request.bundles[0].get("GPU", 0) == int(params.get("num-gpus", 0))


def test_on_ray_nobody_else_reaches_ray() -> None:
    manifests = render(read_values("kuberay"))
    for role in ("router", "prefill", "decode"):
        for rule in named(manifests, "NetworkPolicy", role)["spec"]["ingress"]:
            [port] = rule["ports"]
            assert "from" in rule or (role, port["port"]) == ("router", 8000)
    [ray] = of_kind(manifests, "RayCluster")
    assert ray["spec"]["authOptions"] == {"mode": "token"}
    assert not {"Deployment", "PodDisruptionBudget"} & {manifest["kind"] for manifest in manifests}


def test_on_ray_pods_have_time_for_both_drains(tmp_path: Path) -> None:
    manifests = render(read_values("kuberay"))
    drain_s = cluster_config(manifests, tmp_path).launch.drain_timeout_s
    for _, template in pod_templates(manifests):
        assert template["spec"]["terminationGracePeriodSeconds"] > 2 * (drain_s + DRAIN_MARGIN_S)


@pytest.mark.parametrize(
    ("role", "waited_for"),
    [("router", b"tini\0--\0cluster\0launch\0/etc/tandem/cluster.yaml\0"), ("decode", b"ray::RankActor.news\0")],
)
def test_on_ray_a_pod_stays_until_the_launch_is_done_with_it(tmp_path: Path, role: str, waited_for: bytes) -> None:
    """The preStop hook looks for a process, and must not find itself."""
    spec = dict(pod_templates(render(read_values("kuberay"))))[role]["spec"]
    shell, _, script = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert shell == "sh"
    assert "/proc/[0-9]*/cmdline" in script
    (tmp_path / "1").write_bytes(waited_for)
    (tmp_path / "2").write_bytes(b"sh\0-c\0" + script.encode() + b"\0")
    searched = script.replace("/proc/[0-9]*/cmdline", f"{tmp_path}/*").replace("sleep 1", "echo there; break")
    for expected in ("there\n", ""):
        done = subprocess.run([shell, "-c", searched], capture_output=True, text=True, timeout=10, check=False)
        assert done.stdout == expected
        (tmp_path / "1").unlink(missing_ok=True)


def test_on_ray_pods_come_and_go_without_a_restart_of_the_launch() -> None:
    def checksum(**changes: Any) -> str:
        template = dict(pod_templates(render(changed(read_values("kuberay"), **changes))))["router"]
        found: str = template["metadata"]["annotations"]["checksum/config"]
        return found

    assert checksum() == checksum(decode__replicas=5)
    assert checksum() != checksum(decode__engine__max_num_sequences=7)


def test_on_ray_the_version_is_that_of_the_image() -> None:
    locked = (ROOT / "requirements.lock").read_text().splitlines()
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    assert f"ray=={defaults['kuberay']['rayVersion']}" in locked


def test_schema_has_every_key_of_the_configs_and_no_other() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    engine = schema["definitions"]["engine"]["properties"]
    assert set(engine) == set(EngineConfig.__struct_fields__)
    assert set(engine["speculation"]["properties"]) == set(SpeculationConfig.__struct_fields__)
    ours = {"model_name", "model_path", "prefill", "decode", "host", "port", "drain_timeout_s", "log_level"}
    tuning = set(schema["properties"]["router"]["properties"]["config"]["properties"])
    assert tuning <= set(RouterConfig.__struct_fields__) - ours


def test_schema_is_closed_and_has_every_default() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    _compare(defaults, schema, schema["definitions"], "")


def _compare(values: Any, schema: Any, definitions: Any, path: str) -> None:
    schema = definitions[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    if schema.get("additionalProperties") is not False or path.endswith("/engine") or path == "/router/config":
        return
    assert set(values) == set(schema["properties"]) - {"global"}, path
    for key, value in values.items():
        if isinstance(value, dict) and "resources" not in key:
            _compare(value, schema["properties"][key], definitions, f"{path}/{key}")


def test_readme_is_what_the_comments_say() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "helm_readme.py"), "--check"], check=False, timeout=60)
    assert done.returncode == 0


def test_image_starts_what_the_chart_asks_for() -> None:
    """The chart sets `args` only, so the image's entry point must run them, as the chart's user."""
    stages = (ROOT / "Dockerfile").read_text().split("\nFROM ")
    runtime = next(stage for stage in stages if "AS runtime" in stage)
    assert 'ENTRYPOINT ["tini", "--"]' in runtime
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    for target in ("cpu", "cuda"):
        [stage] = [stage for stage in stages if f"AS {target}\n" in stage]
        assert f"USER {defaults['security']['runAsUser']}:" in stage
    assert [
        line
        for line in (ROOT / "Dockerfile").read_text().splitlines()
        if "pip install" in line and "-c requirements.lock" not in line
    ] == []


def test_advertised_host_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"model": "demo", "host": "0.0.0.0", "allow_plaintext_network": true}')
    monkeypatch.setenv("TANDEM_ADVERTISED_HOST", "10.1.2.3")
    assert read_config(str(path)).advertised_host == "10.1.2.3"
    path.write_text('{"model": "demo", "advertised_host": "worker.example"}')
    assert read_config(str(path)).advertised_host == "worker.example"
    path.write_text('{"model": "demo", "host": "0.0.0.0"}')
    with pytest.raises(ConfigError, match="allow_plaintext_network"):
        read_config(str(path))


def test_a_worker_checks_its_engine_s_values(tmp_path: Path) -> None:
    """A chart renders what `cluster launch` would refuse."""
    path = tmp_path / "config.json"
    path.write_text('{"model": "demo", "engine": {"max_batched_tokens": 32, "max_num_sequences": 64}}')
    with pytest.raises(ConfigError, match=r"engine.max_batched_tokens: 32 is less than max_num_sequences \(64\)"):
        read_config(str(path))
    for pool in ('"much"', '"1.5 PiB"', "true", "1.5"):
        path.write_text(f'{{"model": "demo", "engine": {{"kv_cache_bytes": {pool}}}}}')
        with pytest.raises(ConfigError, match="kv_cache_bytes"):
            read_config(str(path))


def _config(manifests: list[Manifest], role: str) -> str:
    text: str = named(manifests, "ConfigMap", role)["data"]["config.json"]
    return text


def _router_config(manifests: list[Manifest]) -> RouterConfig:
    return msgspec.json.decode(_config(manifests, "router"), type=RouterConfig)


def cluster_config(manifests: list[Manifest], directory: Path) -> ClusterConfig:
    """Of `cluster launch` in the head pod, read as it would be."""
    path = directory / "cluster.yaml"
    path.write_text(named(manifests, "ConfigMap", "cluster")["data"]["cluster.yaml"])
    return load_config(path)
