# Sourced by the scripts beside it: where things lie, and what they share.
# All that is downloaded, built or measured lies under BENCH_DIR; nothing of it belongs in the repository.
set -euo pipefail
BENCH_DIR="${BENCH_DIR:-${TMPDIR:-/tmp}/bench}"
MODELS="$BENCH_DIR/models"
GGUF="$MODELS/gguf"
ADAPTERS="$BENCH_DIR/adapters/smollm2"
VENVS="$BENCH_DIR/venvs"
LOGS="$BENCH_DIR/logs"
PYTHON="${PYTHON:-python3}"
TORCH="${TORCH:-torch==2.13.0+cpu}"
PEERS="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
THREADS="${THREADS:-$(nproc)}"

# Without bfloat16 instructions torch's products of many rows in bfloat16 are several times slower than in float32
# (32 rows of this model on AVX2: 976 against 272 ms of processor time); peers on torch take what is faster.
torch_dtype() { if grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then echo bfloat16; else echo float32; fi; }

say() { printf '%s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
usage() { sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$0" >&2; exit 2; }

# venv NAME: make the virtual environment once; print its folder.
venv() {
  [ -x "$VENVS/$1/bin/python" ] || { mkdir -p "$VENVS"; "$PYTHON" -m venv "$VENVS/$1" && "$VENVS/$1/bin/pip" -q install -U pip >&2; }
  printf '%s\n' "$VENVS/$1"
}

# quietly NAME COMMAND...: its output goes to a log, whose end is shown when it fails.
quietly() {
  local log="$LOGS/$1.log"; shift
  mkdir -p "$LOGS"
  "$@" >"$log" 2>&1 || { tail -20 "$log" >&2; die "failed: $* (all it said: $log)"; }
}

# torch_into VENV: the CPU build by exact version where the package indexes have it, else the default build.
torch_into() {
  "$1/bin/python" -c 'import torch' 2>/dev/null || "$1/bin/pip" -q install "$TORCH" 2>/dev/null ||
    "$1/bin/pip" -q install "${TORCH%%+*}"
}

# lines ARG...: a command, one argument a line, for `benchmarks/compare.py` to run.
lines() { printf '%s\n' "$@"; }

# version_of VENV PACKAGE
version_of() { "$VENVS/$1/bin/python" -c 'import importlib.metadata as m, sys; print(m.version(sys.argv[1]))' "$2"; }

# adapter_names COUNT: a000, a001, ...
adapter_names() { local i; for ((i = 0; i < $1; i++)); do printf 'a%03d\n' "$i"; done; }

# No peer may look for a hub, or report home, in the middle of a measurement.
OFFLINE=(env HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
  DO_NOT_TRACK=1 "HF_HOME=$BENCH_DIR/cache/hf")
