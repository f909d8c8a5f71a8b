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
- {{ printf "--%s=%v" $flag . | quote }}
{{- end }}
{{- else if not (kindIs "bool" $value) }}
- {{ printf "--%s=%s" $flag (toString $value) | quote }}
{{- else if $value }}
- --{{ $flag }}
{{- end }}
{{- end }}
{{- end }}

{{- /* What the container may do: the "restricted" policy of pod security. */ -}}
{{- define "understudy.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- define "understudy.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile:
  type: RuntimeDefault
{{- end }}
