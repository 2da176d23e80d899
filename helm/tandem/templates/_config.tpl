{{/* The processes' own config files, from values. */}}

{{- define "tandem.routerConfig" -}}
{{- $values := .Values -}}
{{- $config := dict
  "model_name" $values.model.name
  "model_path" (include "tandem.modelPath" .)
  "prefill" (list (include "tandem.source" (dict "root" . "role" "prefill")))
  "decode" (list (include "tandem.source" (dict "root" . "role" "decode")))
  "host" $values.listenHost
  "port" (int $values.router.port)
  "drain_timeout_s" $values.router.drainTimeoutSeconds
  "log_level" $values.logging.level
  "log_format" $values.logging.format
-}}
{{- merge $config $values.router.config | toPrettyJson -}}
{{- end -}}

{{- define "tandem.workerConfig" -}}
{{- $values := .root.Values -}}
{{- $pool := index $values .role -}}
{{- $config := dict
  "model" (include "tandem.modelPath" .root)
  "model_name" $values.model.name
  "host" $values.listenHost
  "port" (int $pool.port)
  "engine" $pool.engine
  "cluster_key_file" "/var/run/secrets/tandem/cluster-key"
  "transport" "nixl"
  "lease_s" $values.connector.lease_s
  "load_timeout_s" $values.connector.load_timeout_s
  "on_failure" $values.connector.on_failure
  "drain_timeout_s" $pool.drainTimeoutSeconds
  "allow_plaintext_network" $values.security.allowPlaintextNetwork
  "log_level" $values.logging.level
  "log_format" $values.logging.format
-}}
{{- with $values.model.quantization -}}
{{- $_ := set $config "model_quantization" . -}}
{{- end -}}
{{- with $values.model.residualDtype -}}
{{- $_ := set $config "model_residual_dtype" . -}}
{{- end -}}
{{- if gt (include "tandem.numRanks" $pool | int) 1 -}}
{{- $_ := set $config "parallel" (omit $pool.group "ranksPerPod") -}}
{{- end -}}
{{- toPrettyJson $config -}}
{{- end -}}
