{{/* Names and labels. */}}

{{- define "tandem.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "tandem.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* (dict "root" $ "role" "prefill") */}}
{{- define "tandem.roleSelector" -}}
{{ include "tandem.selector" .root }}
app.kubernetes.io/component: {{ .role }}
{{- end -}}

{{- define "tandem.labels" -}}
{{ include "tandem.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "tandem.roleLabels" -}}
{{ include "tandem.labels" .root }}
app.kubernetes.io/component: {{ .role }}
{{- end -}}

{{- define "tandem.roleName" -}}
{{ include "tandem.fullname" .root }}-{{ .role }}
{{- end -}}

{{/* Routers and workers have accounts of their own: only a router may have a right. */}}
{{- define "tandem.serviceAccount" -}}
{{- $account := .root.Values.serviceAccount -}}
{{- $isRouter := eq .role "router" -}}
{{- if $account.create -}}
{{ include "tandem.fullname" .root }}-{{ ternary "router" "worker" $isRouter }}
{{- else -}}
{{ ternary $account.router $account.worker $isRouter }}
{{- end -}}
{{- end -}}

{{/* A router that follows EndpointSlices needs a token. */}}
{{- define "tandem.hasToken" -}}
{{- and (eq .role "router") (eq .root.Values.discovery.type "kubernetes") -}}
{{- end -}}

{{- define "tandem.image" -}}
{{- $image := .Values.image -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ default .Chart.AppVersion $image.tag }}
{{- end -}}
{{- end -}}

{{/* Where the product finds the model: a name it fetches, or a path of a mounted volume. */}}
{{- define "tandem.modelPath" -}}
{{- $model := .Values.model -}}
{{- if eq $model.source "demo" -}}
demo
{{- else if eq $model.source "huggingface" -}}
{{ $model.huggingface.repository }}@{{ $model.huggingface.revision }}
{{- else if eq $model.source "pvc" -}}
{{ printf "/model/%s" $model.pvc.path | trimSuffix "/" }}
{{- else -}}
{{ printf "/model/%s" $model.image.path | trimSuffix "/" }}
{{- end -}}
{{- end -}}

{{- define "tandem.fetchesModel" -}}
{{- if or (eq .Values.model.source "demo") (eq .Values.model.source "huggingface") -}}true{{- end -}}
{{- end -}}

{{/* Ranks of one group. Argument: a pool's values. */}}
{{- define "tandem.numRanks" -}}
{{ mul .group.tensorParallel .group.pipelineParallel .group.dataParallel }}
{{- end -}}

{{/* Ranks in one pod: as told, or one for each accelerator, or all of the group. */}}
{{- define "tandem.ranksPerPod" -}}
{{- $ranks := include "tandem.numRanks" . | int -}}
{{- if .group.ranksPerPod -}}
{{ .group.ranksPerPod }}
{{- else if and .accelerator.resource (gt (int .accelerator.count) 0) -}}
{{ min $ranks (int .accelerator.count) }}
{{- else -}}
{{ $ranks }}
{{- end -}}
{{- end -}}

{{- define "tandem.podsPerGroup" -}}
{{ div (include "tandem.numRanks" . | int) (include "tandem.ranksPerPod" . | int) }}
{{- end -}}

{{/* The service whose endpoints are a pool's workers; a LeaderWorkerSet makes one of its own name itself. */}}
{{- define "tandem.workersName" -}}
{{ include "tandem.roleName" . }}-workers
{{- end -}}

{{/* Where a router looks for the workers of a pool, see cluster/router/discovery.py. */}}
{{- define "tandem.source" -}}
{{- $port := (index .root.Values .role).port -}}
{{- if eq .root.Values.discovery.type "kubernetes" -}}
kubernetes:{{ .root.Release.Namespace }}/{{ include "tandem.workersName" . }}:{{ $port }}
{{- else -}}
dns:{{ include "tandem.workersName" . }}.{{ .root.Release.Namespace }}.svc:{{ $port }}
{{- end -}}
{{- end -}}
