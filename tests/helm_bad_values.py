"""Values that must be refused, and a part of the reason that must be given."""

from __future__ import annotations

from typing import Any

RAY = {"kuberay__enabled": True}
GPU = {"resource": "nvidia.com/gpu", "count": 4}

# (what is changed in ci/cpu-demo-values.yaml, text of the refusal)
BAD_VALUES: tuple[tuple[dict[str, Any], str], ...] = (
    # refused by values.schema.json
    ({"preffill": {}}, "additional properties 'preffill' not allowed"),
    ({"prefill__replica": 2}, "additional properties 'replica' not allowed"),
    ({"prefill__replicas": 0}, "/prefill/replicas"),
    ({"prefill__replicas": "two"}, "/prefill/replicas"),
    ({"prefill__port": 70_000}, "/prefill/port"),
    ({"prefill__workload": "DaemonSet"}, "/prefill/workload"),
    ({"prefill__engine__block_size": 24}, "/prefill/engine/block_size"),
    ({"decode__engine__kv_cache_bytes": "much"}, "/decode/engine/kv_cache_bytes"),
    ({"decode__engine__blocks": 3}, "additional properties 'blocks' not allowed"),
    ({"decode__engine__device": "tpu"}, "/decode/engine/device"),
    ({"decode__engine__speculation": {"method": "oracle"}}, "/decode/engine/speculation/method"),
    ({"decode__shmSize": "much"}, "/decode/shmSize"),
    ({"decode__autoscaling__kvUsage": 80}, "/decode/autoscaling/kvUsage"),
    ({"decode__podDisruptionBudget__maxUnavailable": 0}, "/decode/podDisruptionBudget/maxUnavailable"),
    ({"router__config__max_connections": 0}, "/router/config/max_connections"),
    ({"model__source": "s3"}, "/model/source"),
    ({"model__quantization": "int4"}, "/model/quantization"),
    ({"model__huggingface__revision": "main"}, "/model/huggingface/revision"),
    ({"model__pvc__path": "../../etc"}, "/model/pvc/path"),
    ({"image__tag": "latest"}, "/image/tag"),
    ({"image__digest": "sha256:1234"}, "/image/digest"),
    ({"security__runAsUser": 0}, "/security/runAsUser"),
    ({"tls": {"enabled": True}}, "additional properties 'tls' not allowed"),
    ({"clusterKey__value": "secret"}, "additional properties 'value' not allowed"),
    ({"connector__on_failure": "retry"}, "/connector/on_failure"),
    ({"networkPolicy__clients": [{}]}, "/networkPolicy/clients/0"),
    # refused by the templates
    ({"image__repository": None}, "image.repository is not set"),
    ({"clusterKey__existingSecret": None}, "clusterKey.existingSecret is not set"),
    ({"security__allowPlaintextNetwork": False}, "security.allowPlaintextNetwork is false"),
    ({"model__source": "huggingface"}, "model.huggingface.repository is not set"),
    (
        {"model__source": "huggingface", "model__huggingface__repository": "a/b"},
        "model.huggingface.revision is not set",
    ),
    ({"model__source": "pvc"}, "model.pvc.claimName is not set"),
    ({"model__source": "image"}, "model.image.reference is not set"),
    (
        {"prefill__terminationGracePeriodSeconds": 32, "prefill__drainTimeoutSeconds": 30},
        "prefill.terminationGracePeriodSeconds (32) must be more than preStopSeconds + connector.lease_s (32)",
    ),
    (
        {"decode__terminationGracePeriodSeconds": 72},
        "decode.terminationGracePeriodSeconds (72) must be more than preStopSeconds + drainTimeoutSeconds + 10 (72)",
    ),
    (
        {"router__terminationGracePeriodSeconds": 70},
        "router.terminationGracePeriodSeconds (70) must be more than preStopSeconds + drainTimeoutSeconds + 5 (70)",
    ),
    ({"connector__lease_s": 61}, "prefill.drainTimeoutSeconds (60) must be at least connector.lease_s (61)"),
    ({"discovery__type": "static"}, "/discovery/type"),
    (
        {"discovery__type": "kubernetes", "serviceAccount__create": False},
        "serviceAccount.router and serviceAccount.worker are the same account",
    ),
    (
        {"decode__autoscaling": {"type": "keda", "min": 3, "max": 2}},
        "decode.autoscaling.min (3) is larger than max (2)",
    ),
    (
        {"router__autoscaling": {"type": "hpa"}, "rules__enabled": False},
        "router.autoscaling.type is hpa, and rules.enabled is false",
    ),
    ({"prefill__group__tensorParallel": 4}, "the engine runs groups of one rank only so far"),
    (
        {"preview__groupsOfRanks": True, "prefill__group": {"tensorParallel": 4, "expertParallel": 3}},
        "prefill.group.expertParallel (3) must divide tensorParallel times dataParallel (4)",
    ),
    (
        {"preview__groupsOfRanks": True, "prefill__group": {"tensorParallel": 4, "ranksPerPod": 3}},
        "prefill.group: 4 ranks do not fill pods of 3 ranks",
    ),
    (
        {"preview__groupsOfRanks": True, "prefill__group": {"tensorParallel": 4, "ranksPerPod": 2}},
        "which a Deployment cannot keep together; set prefill.workload to LeaderWorkerSet",
    ),
    (
        {
            "preview__groupsOfRanks": True,
            "decode__group": {"tensorParallel": 8, "ranksPerPod": 8},
            "decode__accelerator": GPU,
            "decode__engine__device": "cuda",
        },
        "decode.group.ranksPerPod (8) is larger than accelerator.count (4)",
    ),
    (
        {"decode__accelerator": GPU, "decode__engine__device": "cuda"},
        "decode.accelerator.count is 4, and the ranks of a pod (1) use one each: the others would be idle; raise",
    ),
    ({"decode__engine__device": "cuda"}, "neither accelerator.resource nor accelerator.claim is set"),
    ({"decode__accelerator": GPU}, "the accelerator would be idle"),
    (
        {"decode__accelerator": {**GPU, "claim": "gpu"}, "decode__engine__device": "cuda"},
        "decode.accelerator.resource and decode.accelerator.claim are both set",
    ),
    (
        {"decode__accelerator": {"resource": "nvidia.com/gpu"}, "decode__engine__device": "cuda"},
        "decode.accelerator.count must be at least 1",
    ),
    (
        {"decode__accelerator": {"claim": "gpu"}, "decode__engine": {"device": "cuda"}},
        "decode.engine.kv_cache_bytes must be set with accelerator.claim",
    ),
    (
        {"prefill__engine__max_model_len": 4096, "decode__engine__max_model_len": 2048},
        "prefill.engine.max_model_len (4096) is larger than decode.engine.max_model_len (2048)",
    ),
    ({"prefill__engine__speculation": {"method": "ngram"}}, "set speculation under decode.engine"),
    ({"inferencePool": {"enabled": True}}, "inferencePool.endpointPicker is not set"),
    (
        {"disaggregatedSet": {"enabled": True}, "decode__autoscaling": {"type": "hpa", "max": 1}},
        "decode.autoscaling.type is hpa, but disaggregatedSet.enabled",
    ),
    # KubeRay
    ({"kuberay__enabled": "yes"}, "/kuberay/enabled"),
    ({"kuberay__rayVersion": "latest"}, "/kuberay/rayVersion"),
    ({"kuberay__workers": {}}, "additional properties 'workers' not allowed"),
    ({**RAY, "fullnameOverride": "2nd"}, "its name must begin with a letter"),
    ({**RAY, "disaggregatedSet": {"enabled": True}}, "kuberay.enabled and disaggregatedSet.enabled are both set"),
    ({**RAY, "discovery__type": "kubernetes"}, "discovery.type is kubernetes, but kuberay.enabled"),
    ({**RAY, "router__replicas": 2}, "router.replicas is 2, but kuberay.enabled"),
    ({**RAY, "decode__autoscaling": {"type": "keda"}}, "decode.autoscaling.type is keda, but kuberay.enabled"),
    ({**RAY, "prefill__workload": "LeaderWorkerSet"}, "prefill.workload is LeaderWorkerSet, but kuberay.enabled"),
    (
        {**RAY, "preview__groupsOfRanks": True, "decode__group": {"tensorParallel": 2}},
        "decode.group has 2 ranks, and kuberay.enabled renders groups of one rank only",
    ),
    ({**RAY, "decode__engine__num_threads": None}, "decode.engine.num_threads is not set, and kuberay.enabled"),
)
