{{/* A LeaderWorkerSet's spec without its number of replicas: the same pod for every rank of the group, restarted
together, because a group that has lost a rank cannot go on. */}}
{{- define "tandem.groupSpec" -}}
{{- $pool := index .root.Values .role -}}
startupPolicy: LeaderCreated
rolloutStrategy:
  type: RollingUpdate
  rollingUpdateConfiguration: {maxUnavailable: 1, maxSurge: 0}
networkConfig:
  subdomainPolicy: Shared
leaderWorkerTemplate:
  size: {{ include "tandem.podsPerGroup" $pool }}
  restartPolicy: RecreateGroupOnPodRestart
  workerTemplate:
    metadata:
      {{- include "tandem.podMetadata" . | nindent 6 }}
    spec:
      {{- include "tandem.podSpec" . | nindent 6 }}
{{- end -}}
