"""What the chart uses of other projects' custom resources, as closed schemas written by hand after their definitions
(LeaderWorkerSet and DisaggregatedSet v1, KEDA v1alpha1, PodMonitor v1, InferencePool v1, RayCluster v1). They are a
part of each: pod templates are validated by `helm_chart.check_native`, and `python -m benchmarks.helm --crds DIRECTORY`
validates against the complete definitions where one has them.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "minLength": 1}
COUNT: Schema = {"type": "integer", "minimum": 1}
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
OBJECT: Schema = {"type": "object"}


def closed(required: str, **properties: Schema) -> Schema:
    return {"type": "object", "required": required.split(), "properties": properties, "additionalProperties": False}


def resource(spec: Schema) -> Schema:
    metadata = closed("name namespace labels", name=TEXT, namespace=TEXT, labels=OBJECT)
    return closed("apiVersion kind metadata spec", apiVersion=TEXT, kind=TEXT, metadata=metadata, spec=spec)


def several(items: Schema) -> Schema:
    return {"type": "array", "minItems": 1, "items": items}


LABELS = closed("matchLabels", matchLabels={"type": "object", "additionalProperties": TEXT})
GROUP = closed(
    "leaderWorkerTemplate",
    replicas=COUNT,
    startupPolicy={"enum": ["LeaderCreated", "LeaderReady"]},
    rolloutStrategy=closed(
        "type rollingUpdateConfiguration",
        type={"const": "RollingUpdate"},
        rollingUpdateConfiguration=closed("", maxUnavailable={"type": "integer"}, maxSurge={"type": "integer"}),
    ),
    networkConfig=closed("", subdomainPolicy={"enum": ["Shared", "UniquePerReplica"]}),
    leaderWorkerTemplate=closed(
        "size workerTemplate",
        size=COUNT,
        restartPolicy={"enum": ["Default", "RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"]},
        workerTemplate=closed("metadata spec", metadata=OBJECT, spec=OBJECT),
    ),
)
TRIGGER = closed(
    "type metadata",
    type={"const": "prometheus"},
    metricType={"enum": ["AverageValue", "Value"]},
    metadata=closed("serverAddress query threshold", serverAddress=TEXT, query=TEXT, threshold=TEXT),
)

TEMPLATE = closed("metadata spec", metadata=closed("labels", labels=OBJECT, annotations=OBJECT), spec=OBJECT)
RAY_PARAMS: Schema = {"type": "object", "additionalProperties": TEXT}  # of `ray start`, all of them text
RAY_WORKERS = closed(
    "groupName minReplicas maxReplicas rayStartParams template",
    groupName=TEXT,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    labels={"type": "object", "additionalProperties": TEXT},
    rayStartParams=RAY_PARAMS,
    template=TEMPLATE,
)

SCHEMAS: dict[tuple[str, str], Schema] = {
    ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"): resource(GROUP),
    ("disaggregatedset.x-k8s.io/v1", "DisaggregatedSet"): resource(
        closed("roles", roles=several(closed("name spec", name=TEXT, spec=GROUP)))
    ),
    ("keda.sh/v1alpha1", "ScaledObject"): resource(
        closed(
            "scaleTargetRef triggers",
            scaleTargetRef=closed("apiVersion kind name", apiVersion=TEXT, kind=TEXT, name=TEXT),
            minReplicaCount=COUNT,
            maxReplicaCount=COUNT,
            pollingInterval=COUNT,
            cooldownPeriod=COUNT,
            triggers=several(TRIGGER),
        )
    ),
    ("monitoring.coreos.com/v1", "PodMonitor"): resource(
        closed(
            "selector podMetricsEndpoints",
            podTargetLabels=several(TEXT),
            selector=LABELS,
            podMetricsEndpoints=several(closed("port path interval", port=TEXT, path=TEXT, interval=TEXT)),
        )
    ),
    ("inference.networking.k8s.io/v1", "InferencePool"): resource(
        closed(
            "selector targetPorts endpointPickerRef",
            selector=LABELS,
            targetPorts=several(closed("number", number=PORT)),
            endpointPickerRef=closed("name port", name=TEXT, port=closed("number", number=PORT)),
        )
    ),
    ("ray.io/v1", "RayCluster"): resource(
        closed(
            "headGroupSpec",
            rayVersion=TEXT,  # required with authOptions
            authOptions=closed("mode", mode={"enum": ["disabled", "token"]}),
            upgradeStrategy=closed("type", type={"enum": ["Recreate", "None"]}),
            headGroupSpec=closed("template", rayStartParams=RAY_PARAMS, template=TEMPLATE),
            workerGroupSpecs=several(RAY_WORKERS),
        )
    ),
}
