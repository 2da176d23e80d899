{{/* What the pods of all roles share. Arguments: (dict "root" $ "role" "prefill"). */}}

{{- define "tandem.podMetadata" -}}
{{- $block := index .root.Values .role -}}
labels:
  {{- include "tandem.roleLabels" . | nindent 2 }}
  {{- with $block.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
annotations:
  kubectl.kubernetes.io/default-container: {{ .role }}
  checksum/config: {{ include (ternary "tandem.routerConfig" "tandem.workerConfig" (eq .role "router")) (ternary .root . (eq .role "router")) | sha256sum }}
  {{- with $block.podAnnotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{- define "tandem.podSpec" -}}
{{ include "tandem.podSettings" . }}
terminationGracePeriodSeconds: {{ (index .root.Values .role).terminationGracePeriodSeconds }}
containers:
  - name: {{ .role }}
    {{- include "tandem.container" . | nindent 4 }}
volumes:
  - name: config
    configMap:
      name: {{ include "tandem.roleName" . }}
  {{- include "tandem.volumes" . | nindent 2 }}
  {{- if ne .role "router" }}
  {{- include "tandem.keyVolume" .root | nindent 2 }}
  {{- end }}
{{- end -}}

{{- define "tandem.podSettings" -}}
{{- $values := .root.Values -}}
{{- $block := index $values .role -}}
serviceAccountName: {{ include "tandem.serviceAccount" . }}
automountServiceAccountToken: {{ include "tandem.hasToken" . }}
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: {{ $values.security.runAsUser }}
  runAsGroup: {{ $values.security.runAsUser }}
  fsGroup: {{ $values.security.runAsUser }}
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- with $values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with $block.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- $tolerations := include "tandem.tolerations" $block | fromYamlArray }}
{{- with $tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $block.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $block.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with $block.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $block.topologySpreadKey }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "tandem.roleSelector" $ | nindent 8 }}
{{- end }}
{{- if ne .role "router" }}
{{- with $block.accelerator.claim }}
resourceClaims:
  - name: accelerator
    resourceClaimName: {{ . }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "tandem.tolerations" -}}
{{- with .tolerations }}
{{ toYaml . }}
{{- end }}
{{- with .accelerator }}
{{- if .resource }}
- key: {{ .resource }}
  operator: Exists
  effect: NoSchedule
{{- end }}
{{- end }}
{{- end -}}

{{- define "tandem.container" -}}
{{- $values := .root.Values -}}
{{- $block := index $values .role -}}
{{- $isRouter := eq .role "router" -}}
{{ include "tandem.containerImage" .root }}
args: ["python", "-m", {{ ternary "cluster.router" .role $isRouter | quote }}, "--config", "/etc/tandem/config.json"]
ports:
  - name: {{ ternary "http" "grpc" $isRouter }}
    containerPort: {{ $block.port }}
env:
  {{- if not $isRouter }}
  - name: TANDEM_ADVERTISED_HOST
    valueFrom:
      fieldRef:
        fieldPath: status.podIP
  {{- end }}
  {{- include "tandem.env" . | nindent 2 }}
{{ include "tandem.containerSecurity" . }}
resources:
  {{- include "tandem.resources" $block | nindent 2 }}
lifecycle:
  preStop:
    sleep:
      seconds: {{ $block.preStopSeconds }}
{{ include "tandem.probes" . }}
volumeMounts:
  - {name: config, mountPath: /etc/tandem, readOnly: true}
  {{- include "tandem.mounts" . | nindent 2 }}
  {{- if not $isRouter }}
  - {name: cluster-key, mountPath: /var/run/secrets/tandem, readOnly: true}
  {{- end }}
{{- end -}}

{{- define "tandem.containerImage" -}}
image: {{ include "tandem.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- end -}}

{{- define "tandem.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  runAsNonRoot: true
  capabilities:
    drop: [ALL]
    {{- if and (ne .role "router") (dig "rdma" "ipcLock" false (index .root.Values .role)) }}
    add: [IPC_LOCK]
    {{- end }}
{{- end -}}

{{- define "tandem.env" -}}
{{- $model := .root.Values.model -}}
- name: HOME
  value: /tmp
- name: XDG_CACHE_HOME
  value: /var/cache
{{- if and (eq $model.source "huggingface") $model.huggingface.tokenSecret.name }}
- name: HF_TOKEN_PATH
  value: /var/run/secrets/huggingface/token
{{- end }}
{{- range $name, $value := (index .root.Values .role).env }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end -}}

{{/* Of `tandem.volumes`. */}}
{{- define "tandem.mounts" -}}
{{- $model := .root.Values.model -}}
- {name: tmp, mountPath: /tmp}
- {name: cache, mountPath: /var/cache}
{{- if has $model.source (list "pvc" "image") }}
- {name: model, mountPath: /model, readOnly: true}
{{- end }}
{{- if and (eq $model.source "huggingface") $model.huggingface.tokenSecret.name }}
- {name: huggingface-token, mountPath: /var/run/secrets/huggingface, readOnly: true}
{{- end }}
{{- if ne .role "router" }}
- {name: shm, mountPath: /dev/shm}
{{- end }}
{{- end -}}

{{/* Requests and limits as given, and the devices, which must be equal in both. Argument: a role's values. */}}
{{- define "tandem.resources" -}}
{{- $devices := dict -}}
{{- with .accelerator -}}
{{- if .resource -}}{{- $_ := set $devices .resource (int .count) -}}{{- end -}}
{{- end -}}
{{- with .rdma -}}
{{- if .resource -}}{{- $_ := set $devices .resource (int .count) -}}{{- end -}}
{{- end -}}
{{- $resources := dict "requests" (merge (dict) $devices (default dict .resources.requests)) "limits" (merge (dict) $devices (default dict .resources.limits)) -}}
{{- with .accelerator -}}
{{- if .claim -}}{{- $_ := set $resources "claims" (list (dict "name" "accelerator")) -}}{{- end -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* Started: the model is loaded. Ready: requests can be served. Alive: the event loop answers; a drain must not
look like death, so a worker is given longer than its drain. */}}
{{- define "tandem.probes" -}}
{{- $block := index .root.Values .role -}}
{{- $isRouter := eq .role "router" -}}
startupProbe:
  {{- if $isRouter }}
  httpGet: {path: /version, port: http}
  {{- else }}
  grpc: {port: {{ $block.port }}}
  {{- end }}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: {{ div (add (int $block.startupSeconds) 4) 5 }}
readinessProbe:
  {{- if $isRouter }}
  httpGet: {path: /health, port: http}
  {{- else }}
  grpc: {port: {{ $block.port }}}
  {{- end }}
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: 2
livenessProbe:
  {{- if $isRouter }}
  httpGet: {path: /version, port: http}
  {{- else }}
  grpc: {port: {{ $block.port }}}
  {{- end }}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: {{ ternary 3 (add 3 (div (int $block.drainTimeoutSeconds) 10)) $isRouter }}
{{- end -}}

{{- define "tandem.volumes" -}}
{{- $values := .root.Values -}}
- name: tmp
  emptyDir:
    sizeLimit: 1Gi
- name: cache
  {{- if $values.cache.existingClaim }}
  persistentVolumeClaim:
    claimName: {{ $values.cache.existingClaim }}
  {{- else }}
  emptyDir:
    sizeLimit: {{ $values.cache.size }}
  {{- end }}
{{- if eq $values.model.source "pvc" }}
- name: model
  persistentVolumeClaim:
    claimName: {{ $values.model.pvc.claimName }}
    readOnly: true
{{- else if eq $values.model.source "image" }}
- name: model
  image:
    reference: {{ $values.model.image.reference }}
    pullPolicy: {{ $values.model.image.pullPolicy }}
{{- end }}
{{- with $values.model.huggingface.tokenSecret }}
{{- if and (eq $values.model.source "huggingface") .name }}
- name: huggingface-token
  secret:
    secretName: {{ .name }}
    defaultMode: 0440
    items:
      - {key: {{ .key }}, path: token}
{{- end }}
{{- end }}
{{- if ne .role "router" }}
- name: shm
  emptyDir:
    medium: Memory
    sizeLimit: {{ (index $values .role).shmSize }}
{{- end }}
{{- end -}}

{{- define "tandem.keyVolume" -}}
- name: cluster-key
  secret:
    secretName: {{ .Values.clusterKey.existingSecret }}
    defaultMode: 0440
    items:
      - {key: {{ .Values.clusterKey.key }}, path: cluster-key}
{{- end -}}
