{{/* What a schema cannot say. Rendered once; the first thing that is wrong ends the rendering with its reason. */}}

{{- define "tandem.check" -}}
{{- $values := .Values -}}
{{- if not $values.image.repository -}}
{{- fail "image.repository is not set: no image is published, build one with the Dockerfile and push it" -}}
{{- end -}}
{{- if not $values.clusterKey.existingSecret -}}
{{- fail "clusterKey.existingSecret is not set: create a secret with at least 32 random bytes and name it here" -}}
{{- end -}}
{{- if not $values.security.allowPlaintextNetwork -}}
{{- fail "security.allowPlaintextNetwork is false: connections between pods are not encrypted yet; set it to true if you trust their network" -}}
{{- end -}}
{{- include "tandem.checkModel" $values.model -}}
{{- include "tandem.checkRouter" $values -}}
{{- range $role := list "prefill" "decode" -}}
{{- include "tandem.checkPool" (dict "role" $role "pool" (index $values $role) "values" $values) -}}
{{- end -}}
{{- $prefill := $values.prefill.engine.max_model_len -}}
{{- $decode := $values.decode.engine.max_model_len -}}
{{- if and $prefill $decode (gt (int $prefill) (int $decode)) -}}
{{- fail (printf "prefill.engine.max_model_len (%v) is larger than decode.engine.max_model_len (%v): prompts would be computed that no decode worker can take" $prefill $decode) -}}
{{- end -}}
{{- $speculation := default (dict) $values.prefill.engine.speculation -}}
{{- if ne (default "none" $speculation.method) "none" -}}
{{- fail "prefill.engine.speculation.method is set: a prefill worker draws one token of a request, there is nothing to guess; set speculation under decode.engine" -}}
{{- end -}}
{{- if and (not $values.serviceAccount.create) (eq $values.serviceAccount.router $values.serviceAccount.worker) (eq $values.discovery.type "kubernetes") -}}
{{- fail "serviceAccount.router and serviceAccount.worker are the same account, and discovery.type is kubernetes: workers would get a right that only routers need" -}}
{{- end -}}
{{- if $values.kuberay.enabled -}}
{{- include "tandem.checkRay" . -}}
{{- end -}}
{{- if and $values.inferencePool.enabled (not $values.inferencePool.endpointPicker) -}}
{{- fail "inferencePool.endpointPicker is not set: an InferencePool needs the service of an endpoint picker" -}}
{{- end -}}
{{- end -}}

{{- define "tandem.checkModel" -}}
{{- if and (eq .source "huggingface") (not .huggingface.repository) -}}
{{- fail "model.huggingface.repository is not set, and model.source is huggingface" -}}
{{- end -}}
{{- if and (eq .source "huggingface") (not .huggingface.revision) -}}
{{- fail "model.huggingface.revision is not set: without a commit, pods started at different times may serve different weights" -}}
{{- end -}}
{{- if and (eq .source "pvc") (not .pvc.claimName) -}}
{{- fail "model.pvc.claimName is not set, and model.source is pvc" -}}
{{- end -}}
{{- if and (eq .source "image") (not .image.reference) -}}
{{- fail "model.image.reference is not set, and model.source is image" -}}
{{- end -}}
{{- end -}}

{{- define "tandem.checkAutoscaling" -}}
{{- $scaling := .block.autoscaling -}}
{{- if and (eq $scaling.type "hpa") (not .values.rules.enabled) -}}
{{- fail (printf "%s.autoscaling.type is hpa, and rules.enabled is false: the HPA reads metrics that the rules record" .role) -}}
{{- end -}}
{{- if and (ne $scaling.type "none") (gt (int $scaling.min) (int $scaling.max)) -}}
{{- fail (printf "%s.autoscaling.min (%v) is larger than max (%v)" .role $scaling.min $scaling.max) -}}
{{- end -}}
{{- end -}}

{{- define "tandem.checkRouter" -}}
{{- include "tandem.checkAutoscaling" (dict "role" "router" "block" .router "values" .) -}}
{{- with .router -}}
{{- $needed := add (int .preStopSeconds) (int .drainTimeoutSeconds) 5 -}}
{{- if le (int .terminationGracePeriodSeconds) (int $needed) -}}
{{- fail (printf "router.terminationGracePeriodSeconds (%v) must be more than preStopSeconds + drainTimeoutSeconds + 5 (%v): running requests would be killed" .terminationGracePeriodSeconds $needed) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "tandem.checkPool" -}}
{{- $role := .role -}}
{{- $pool := .pool -}}
{{- $values := .values -}}
{{- include "tandem.checkAutoscaling" (dict "role" $role "block" $pool "values" $values) -}}
{{- $lease := add (int $pool.preStopSeconds) (ceil $values.connector.lease_s | int) -}}
{{- if le (int $pool.terminationGracePeriodSeconds) (int $lease) -}}
{{- fail (printf "%s.terminationGracePeriodSeconds (%v) must be more than preStopSeconds + connector.lease_s (%v): a reader would lose the blocks it is reading" $role $pool.terminationGracePeriodSeconds $lease) -}}
{{- end -}}
{{- $drain := add (int $pool.preStopSeconds) (int $pool.drainTimeoutSeconds) 10 -}}
{{- if le (int $pool.terminationGracePeriodSeconds) (int $drain) -}}
{{- fail (printf "%s.terminationGracePeriodSeconds (%v) must be more than preStopSeconds + drainTimeoutSeconds + 10 (%v): running requests would be killed" $role $pool.terminationGracePeriodSeconds $drain) -}}
{{- end -}}
{{- if and (eq $role "prefill") (lt (int $pool.drainTimeoutSeconds) (ceil $values.connector.lease_s | int)) -}}
{{- fail (printf "prefill.drainTimeoutSeconds (%v) must be at least connector.lease_s (%v): leases would be given up while they are read" $pool.drainTimeoutSeconds $values.connector.lease_s) -}}
{{- end -}}
{{- include "tandem.checkDevices" . -}}
{{- include "tandem.checkGroup" . -}}
{{- if and $values.disaggregatedSet.enabled (ne $pool.autoscaling.type "none") -}}
{{- fail (printf "%s.autoscaling.type is %s, but disaggregatedSet.enabled: the pools of a DisaggregatedSet are scaled together, not by this chart" $role $pool.autoscaling.type) -}}
{{- end -}}
{{- end -}}

{{- define "tandem.checkDevices" -}}
{{- $accelerator := .pool.accelerator -}}
{{- if and $accelerator.resource $accelerator.claim -}}
{{- fail (printf "%s.accelerator.resource and %s.accelerator.claim are both set: use one" .role .role) -}}
{{- end -}}
{{- if and $accelerator.resource (lt (int $accelerator.count) 1) -}}
{{- fail (printf "%s.accelerator.count must be at least 1, accelerator.resource is %s" .role $accelerator.resource) -}}
{{- end -}}
{{- $device := default "cpu" .pool.engine.device -}}
{{- $has := or $accelerator.resource $accelerator.claim -}}
{{- if and (hasPrefix "cuda" $device) (not $has) -}}
{{- fail (printf "%s.engine.device is %s, but neither accelerator.resource nor accelerator.claim is set" .role $device) -}}
{{- end -}}
{{- if and $has (not (hasPrefix "cuda" $device)) -}}
{{- fail (printf "%s.accelerator is set, but engine.device is %s: the accelerator would be idle" .role $device) -}}
{{- end -}}
{{- if and $accelerator.claim (not .pool.engine.kv_cache_bytes) -}}
{{- fail (printf "%s.engine.kv_cache_bytes must be set with accelerator.claim: pools that share a GPU would each take all of its memory" .role) -}}
{{- end -}}
{{- end -}}

{{- define "tandem.checkGroup" -}}
{{- $role := .role -}}
{{- $group := .pool.group -}}
{{- $ranks := include "tandem.numRanks" .pool | int -}}
{{- $perPod := include "tandem.ranksPerPod" .pool | int -}}
{{- if and (gt $ranks 1) (not .values.preview.groupsOfRanks) -}}
{{- fail (printf "%s.group has %d ranks, and the engine runs groups of one rank only so far; preview.groupsOfRanks renders the objects, but their workers refuse to start" $role $ranks) -}}
{{- end -}}
{{- if mod (mul $group.tensorParallel $group.dataParallel) $group.expertParallel -}}
{{- fail (printf "%s.group.expertParallel (%v) must divide tensorParallel times dataParallel (%v)" $role $group.expertParallel (mul $group.tensorParallel $group.dataParallel)) -}}
{{- end -}}
{{- if mod $ranks $perPod -}}
{{- fail (printf "%s.group: %d ranks do not fill pods of %d ranks" $role $ranks $perPod) -}}
{{- end -}}
{{- if and .pool.accelerator.resource (gt $perPod (int .pool.accelerator.count)) -}}
{{- fail (printf "%s.group.ranksPerPod (%d) is larger than accelerator.count (%v): every rank needs its own" $role $perPod .pool.accelerator.count) -}}
{{- end -}}
{{- if and .pool.accelerator.resource (lt $perPod (int .pool.accelerator.count)) -}}
{{- fail (printf "%s.accelerator.count is %v, and the ranks of a pod (%d) use one each: the others would be idle; raise %s.replicas instead" $role .pool.accelerator.count $perPod $role) -}}
{{- end -}}
{{- if and (gt (include "tandem.podsPerGroup" .pool | int) 1) (ne .pool.workload "LeaderWorkerSet") (not .values.disaggregatedSet.enabled) -}}
{{- fail (printf "%s.group spans %s pods, which a %s cannot keep together; set %s.workload to LeaderWorkerSet" $role (include "tandem.podsPerGroup" .pool) .pool.workload $role) -}}
{{- end -}}
{{- end -}}

{{- define "tandem.checkRay" -}}
{{- $values := .Values -}}
{{- if regexMatch "^[0-9]" (include "tandem.fullname" .) -}}
{{- fail (printf "kuberay.enabled: the RayCluster would be called %s, and its name must begin with a letter; set fullnameOverride" (include "tandem.fullname" .)) -}}
{{- end -}}
{{- if $values.disaggregatedSet.enabled -}}
{{- fail "kuberay.enabled and disaggregatedSet.enabled are both set: use one" -}}
{{- end -}}
{{- if ne $values.discovery.type "dns" -}}
{{- fail (printf "discovery.type is %s, but kuberay.enabled: the launch tells its router where the workers are; leave it at dns" $values.discovery.type) -}}
{{- end -}}
{{- if gt (int $values.router.replicas) 1 -}}
{{- fail (printf "router.replicas is %v, but kuberay.enabled: the router runs beside the launch in the one head pod" $values.router.replicas) -}}
{{- end -}}
{{- range $role := list "router" "prefill" "decode" -}}
{{- if ne (index $values $role).autoscaling.type "none" -}}
{{- fail (printf "%s.autoscaling.type is %s, but kuberay.enabled: there is no Deployment to scale; use `cluster scale` in the head pod" $role (index $values $role).autoscaling.type) -}}
{{- end -}}
{{- end -}}
{{- range $role := list "prefill" "decode" -}}
{{- $pool := index $values $role -}}
{{- if ne $pool.workload "Deployment" -}}
{{- fail (printf "%s.workload is %s, but kuberay.enabled: the pods are those of a RayCluster; leave it out" $role $pool.workload) -}}
{{- end -}}
{{- if gt (include "tandem.numRanks" $pool | int) 1 -}}
{{- fail (printf "%s.group has %s ranks, and kuberay.enabled renders groups of one rank only so far" $role (include "tandem.numRanks" $pool)) -}}
{{- end -}}
{{- if and (not (hasPrefix "cuda" (default "cpu" $pool.engine.device))) (not $pool.engine.num_threads) -}}
{{- fail (printf "%s.engine.num_threads is not set, and kuberay.enabled: a rank on CPUs would have one thread, because Ray says nothing of the pod's cores" $role) -}}
{{- end -}}
{{- end -}}
{{- end -}}
