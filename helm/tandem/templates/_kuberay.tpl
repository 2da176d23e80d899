{{/* A RayCluster whose head pod has a second container, `cluster launch --ray`: the router runs there, and Ray puts the
workers into the pods of the pool they belong to, one group of ranks for each pod. */}}

{{/* Of `cluster launch`. Argument: the root, and `replicas` to leave them out (for the checksum: pods of a pool come and
go without a restart of the others). */}}
{{- define "tandem.clusterConfig" -}}
{{- $values := .root.Values -}}
{{- $model := dict "path" (include "tandem.modelPath" .root) "served_name" $values.model.name -}}
{{- if eq $values.model.source "huggingface" -}}
{{- $model = dict "path" $values.model.huggingface.repository "revision" $values.model.huggingface.revision "served_name" $values.model.name -}}
{{- end -}}
{{- with $values.model.quantization -}}
{{- $_ := set $model "quantization" . -}}
{{- end -}}
{{- with $values.model.residualDtype -}}
{{- $_ := set $model "residual_dtype" . -}}
{{- end -}}
{{- $startup := max (int $values.prefill.startupSeconds) (int $values.decode.startupSeconds) -}}
{{- $ray := dict
  "address" "127.0.0.1:6379"
  "connect_timeout_s" (int $values.router.startupSeconds)
  "placement_timeout_s" $startup
  "cpus_per_rank" 1
  "prefill_labels" (dict "tandem-pool" "prefill")
  "decode_labels" (dict "tandem-pool" "decode")
-}}
{{- $config := dict
  "model" $model
  "router" (merge (dict "host" $values.listenHost "port" (int $values.router.port)) $values.router.config)
  "connector" $values.connector
  "security" (dict "allow_plaintext_network" $values.security.allowPlaintextNetwork "cluster_key_file" "/var/run/secrets/tandem/cluster-key")
  "logging" (dict "level" $values.logging.level "format" $values.logging.format)
  "launch" (dict "backend" "ray" "start_timeout_s" $startup "drain_timeout_s" (include "tandem.rayDrain" $values | int) "ray" $ray)
-}}
{{- range $role := list "prefill" "decode" -}}
{{- $pool := index $values $role -}}
{{- $_ := set $config $role (dict "engine" $pool.engine) -}}
{{- if $.replicas -}}{{- $_ := set (index $config $role) "replicas" (int $pool.replicas) -}}{{- end -}}
{{- end -}}
{{- toPrettyJson $config -}}
{{- end -}}

{{/* Seconds that the launch gives to the router and then to the workers. Argument: values. */}}
{{- define "tandem.rayDrain" -}}
{{ max (int .router.drainTimeoutSeconds) (int .prefill.drainTimeoutSeconds) (int .decode.drainTimeoutSeconds) }}
{{- end -}}

{{/* Both drains with the launch's margins, and what Ray needs. */}}
{{- define "tandem.rayGrace" -}}
{{ add (int .router.preStopSeconds) (mul 2 (add 10 (include "tandem.rayDrain" . | int))) 30 }}
{{- end -}}

{{- define "tandem.rayPodMetadata" -}}
labels:
  {{- include "tandem.roleLabels" . | nindent 2 }}
  {{- with (index .root.Values .role).podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
annotations:
  kubectl.kubernetes.io/default-container: {{ ternary "launch" "ray-worker" (eq .role "router") }}
  {{- if eq .role "router" }}
  checksum/config: {{ include "tandem.clusterConfig" (dict "root" .root "replicas" false) | sha256sum }}
  {{- end }}
  {{- with (index .root.Values .role).podAnnotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* A container that KubeRay gives the command `ray start`. Its probes are ours because those of KubeRay ask Ray's
dashboard, which the image has not. preStop: a pod stays until the launch is done with it.
Arguments: (dict "root" $ "role" "prefill" "port" 6380 "process" "a pattern that does not match itself"). */}}
{{- define "tandem.rayContainer" -}}
{{ include "tandem.containerImage" .root }}
env:
  {{- include "tandem.env" . | nindent 2 }}
  - name: RAY_USAGE_STATS_ENABLED
    value: "0"
{{ include "tandem.containerSecurity" . }}
lifecycle:
  preStop:
    exec:
      command: ["sh", "-c", "while grep -qs {{ .process }} /proc/[0-9]*/cmdline; do sleep 1; done"]
startupProbe:
  tcpSocket: {port: {{ .port }}}
  periodSeconds: 5
  failureThreshold: 60
readinessProbe:
  tcpSocket: {port: {{ .port }}}
  periodSeconds: 5
livenessProbe:
  tcpSocket: {port: {{ .port }}}
  periodSeconds: 10
  failureThreshold: 3
{{- end -}}

{{- define "tandem.rayHeadPod" -}}
{{- $values := .root.Values -}}
{{ include "tandem.podSettings" . }}
terminationGracePeriodSeconds: {{ include "tandem.rayGrace" $values }}
{{- /* Ray looks after the process of the launch, and the head's preStop looks for it */}}
shareProcessNamespace: true
containers:
  - name: ray-head
    {{- include "tandem.rayContainer" (merge (dict "port" 6379 "process" "'tandem/[c]luster[.]yaml'") .) | nindent 4 }}
    resources:
      {{- toYaml $values.kuberay.head.resources | nindent 6 }}
    ports:
      - {name: gcs-server, containerPort: 6379}
    volumeMounts:
      - {name: ray-tmp, mountPath: /tmp}
      - {name: ray, mountPath: /tmp/ray}
      - {name: ray-cache, mountPath: /var/cache}
  - name: launch
    {{- include "tandem.launchContainer" . | nindent 4 }}
volumes:
  - name: config
    configMap:
      name: {{ include "tandem.roleName" (dict "root" .root "role" "cluster") }}
  - name: ray
    emptyDir:
      sizeLimit: 2Gi
  - name: ray-tmp
    emptyDir:
      sizeLimit: 1Gi
  - name: ray-cache
    emptyDir:
      sizeLimit: 1Gi
  - name: ray-token
    secret:
      secretName: {{ include "tandem.fullname" .root }}
      defaultMode: 0440
  {{- include "tandem.volumes" . | nindent 2 }}
  {{- include "tandem.keyVolume" .root | nindent 2 }}
{{- end -}}

{{/* Its files are not those of Ray, save for /tmp/ray, where Ray's sockets are. */}}
{{- define "tandem.launchContainer" -}}
{{- $router := .root.Values.router -}}
{{ include "tandem.containerImage" .root }}
args: ["cluster", "launch", "/etc/tandem/cluster.yaml"]
ports:
  - name: http
    containerPort: {{ $router.port }}
env:
  {{- include "tandem.env" . | nindent 2 }}
  - name: RAY_AUTH_MODE
    value: token
  - name: RAY_AUTH_TOKEN_PATH
    value: /var/run/secrets/ray/auth_token
{{ include "tandem.containerSecurity" . }}
resources:
  {{- include "tandem.resources" $router | nindent 2 }}
lifecycle:
  preStop:
    sleep:
      seconds: {{ $router.preStopSeconds }}
{{ include "tandem.probes" . }}
volumeMounts:
  - {name: config, mountPath: /etc/tandem, readOnly: true}
  - {name: ray, mountPath: /tmp/ray}
  - {name: ray-token, mountPath: /var/run/secrets/ray, readOnly: true}
  - {name: cluster-key, mountPath: /var/run/secrets/tandem, readOnly: true}
  {{- include "tandem.mounts" . | nindent 2 }}
{{- end -}}

{{- define "tandem.rayWorkerPod" -}}
{{ include "tandem.podSettings" . }}
terminationGracePeriodSeconds: {{ include "tandem.rayGrace" .root.Values }}
containers:
  - name: ray-worker
    {{- include "tandem.rayContainer" (merge (dict "port" 6380 "process" "'ray::[R]ankActor'") .) | nindent 4 }}
    resources:
      {{- include "tandem.resources" (index .root.Values .role) | nindent 6 }}
    volumeMounts:
      - {name: cluster-key, mountPath: /var/run/secrets/tandem, readOnly: true}
      {{- include "tandem.mounts" . | nindent 6 }}
volumes:
  {{- include "tandem.volumes" . | nindent 2 }}
  {{- include "tandem.keyVolume" .root | nindent 2 }}
{{- end -}}
