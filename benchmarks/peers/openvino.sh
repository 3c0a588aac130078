#!/usr/bin/env bash
# OpenVINO GenAI's continuous batching, in a process that answers lines (openvino_child.py); base model only, from GGUF.
#   openvino.sh setup
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

setup() {
  local v
  v="$(venv openvino)"
  "$v/bin/python" -c 'import openvino_genai' 2>/dev/null || "$v/bin/pip" -q install openvino-genai openvino-tokenizers numpy
}

verb="${1:-}"; shift || true
case "$verb" in
  setup) "$PEERS/llamacpp.sh" check || say "note: the GGUF files are made by llamacpp.sh setup"; setup ;;
  check) [ -d "$(compgen -G "$VENVS/openvino/lib/python*/site-packages/openvino_genai" | head -1)" ] ;;
  version) echo "openvino-genai $(version_of openvino openvino-genai)" ;;
  child-command) lines "${OFFLINE[@]}" "$VENVS/openvino/bin/python" "$PEERS/openvino_child.py" "$1" ;;
  *) usage ;;
esac
