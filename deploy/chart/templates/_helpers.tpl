{{- define "understudy.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 53 | trimSuffix "-" }}{{ else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 53 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "understudy.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "understudy.labels" -}}
{{ include "understudy.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "understudy.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- /* A flag's value: numbers as they are written, where `toString` would write 4.194304e+06. */ -}}
{{- define "understudy.value" -}}
{{ if kindIs "string" . }}{{ . }}{{ else }}{{ toJson . }}{{ end }}
{{- end }}

{{- /* Arguments of the container: `serve` and its flags. */ -}}
{{- define "understudy.arguments" -}}
- serve
- --shutdown-delay-seconds={{ .Values.shutdown.delaySeconds }}
- --drain-seconds={{ .Values.shutdown.drainSeconds }}
{{- with .Values.models.existingClaim }}
- --models=/models
{{- end }}
{{- with .Values.models.default }}
- {{ printf "--default-model=%s" . | quote }}
{{- end }}
{{- range .Values.allowedHosts }}
- {{ printf "--allowed-host=%s" . | quote }}
{{- end }}
{{- range $flag, $value := .Values.serve }}
{{- if kindIs "slice" $value }}
{{- range $value }}
- {{ printf "--%s=%s" $flag (include "understudy.value" .) | quote }}
{{- end }}
{{- else if not (kindIs "bool" $value) }}
- {{ printf "--%s=%s" $flag (include "understudy.value" $value) | quote }}
{{- else if $value }}
- --{{ $flag }}
{{- end }}
{{- end }}
{{- end }}

{{- /* What the container may do: the "restricted" policy of pod security. */ -}}
{{- define "understudy.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
runAsUser: 10001
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "understudy.podSecurityContext" -}}
runAsGroup: 10001
fsGroup: 10001
{{- end }}
