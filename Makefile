# Every target sets itself up: a virtual environment in .venv, with what it needs from the package indexes
# that your pip is configured for. PYTHON picks the interpreter, VENV another folder, TORCH another build of torch.
PYTHON ?= python3
VENV   ?= .venv
# The CPU build by exact version: a plain "torch" may bring gigabytes of CUDA packages.
TORCH  ?= torch==2.13.0+cpu
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
COMPILED := $(BIN)/python -c 'import sys; from truffula.kernels.cpu import why_unavailable as why; sys.exit(bool(why()))' 2>/dev/null

# Tests start many processes: they find their modules compiled, whatever the shell says of that, and leave the cores be.
TESTING := env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive

.PHONY: help native demo test smoke test-slow test-triton sanitize emulate fuzz soak parity parity-adapters lint check fix bench clean
help:            ## this list
	@grep -hE '^[a-z-]+: .*##|^[a-z-]+: +##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "truffula needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "Could not make a virtual environment: on Debian and Ubuntu, install the package python3-venv."; rm -rf $(VENV); exit 1; }

# What compiles is installed beside what is compiled, so that a second time only what changed is compiled again. The
# installation has a list of packages, too: a new one needs it anew.
$(VENV)/.run: pyproject.toml CMakeLists.txt $(wildcard src/truffula/kernels/cpu/native/*) \
  $(wildcard src/truffula/*/__init__.py src/truffula/*/*/__init__.py) | $(BIN)/python
	@echo "Installing truffula and compiling its native kernels (a minute or two the first time) ..."
	@$(PIP) install -q $$($(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"])') cmake ninja
	@$(COMPILED) || rm -rf $(VENV)/build  # what CMake keeps of a failure stays wrong
	@$(PIP) install -v --no-build-isolation --config-settings=build-dir=$(VENV)/build -e . >$(VENV)/install.log 2>&1 || \
	  { tail -n 30 $(VENV)/install.log; exit 1; }
	@$(COMPILED) || { \
	  echo "The native kernels did not compile: taking the slower torch backend instead. What the compiler said ($(VENV)/install.log):"; \
	  grep -m 3 -A 4 -iE 'error[: ]|failed' $(VENV)/install.log || true; \
	  echo "With a C++20 compiler (on Debian and Ubuntu, the package g++): make native"; }
	@$(COMPILED) || $(MAKE) --no-print-directory $(VENV)/.torch
	@touch $@

$(VENV)/.torch: | $(BIN)/python
	@echo "Installing $(TORCH) ..."
	@$(PIP) install -q "$(TORCH)" 2>$(VENV)/torch.log || { \
	  echo "Your package indexes hold no $(TORCH); taking the default build of the same version (on Linux it may bring CUDA packages)."; \
	  $(PIP) install -q "$(firstword $(subst +, ,$(TORCH)))" || { cat $(VENV)/torch.log; exit 1; }; }
	@touch $@

$(VENV)/.dev: $(VENV)/.run | $(VENV)/.torch
	@echo "Installing what the tests need ..."
	@$(PIP) install -q --no-build-isolation --config-settings=build-dir=$(VENV)/build -e '.[dev]'
	@touch $@

# Without what it needs, which is torch: it compiles and interprets beside any build of it. 300 MB.
TRITON ?= triton==3.9.0
$(VENV)/.triton: | $(VENV)/.dev
	@echo "Installing $(TRITON) ..."
	@$(PIP) install -q --no-deps "$(TRITON)"
	@touch $@

native:          ## compile the native kernels (again): after a compiler was installed
	@rm -f $(VENV)/.run
	@$(MAKE) --no-print-directory $(VENV)/.run

demo: $(VENV)/.run   ## base and three adapters in one batch on a real model, then the server (SERVE=1: it stays, PORT=8000)
	@$(BIN)/python examples/demo.py $(if $(SERVE),--serve) $(if $(PORT),--port $(PORT))

# Workers take whole files. One more than two cores: a fifth of the time a test waits for a process that it started.
JOBS ?= 3
test: $(VENV)/.dev   ## the test suite (< 5 minutes on two cores; JOBS=3)
	@$(TESTING) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

# The second part measures times. 5: ARGS picks no test of a part.
test-slow: $(VENV)/.dev   ## real clients in their own environments, kills, floods, the real model
	@$(TESTING) $(BIN)/python -m pytest -m "slow and not alone and not triton" -n 2 --dist loadfile --timeout=1200 $(ARGS) || [ $$? = 5 ]; \
	failed=$$?; $(TESTING) $(BIN)/python -m pytest -m "slow and alone" --timeout=1200 $(ARGS) || [ $$? = 5 ] && exit $$failed

test-triton: $(VENV)/.triton   ## Triton's kernels under its interpreter, and compiled for GPUs, without one (TRITON="triton==3.8.0")
	@$(TESTING) $(BIN)/python -m pytest -m triton -n 2 --timeout=1200 $(ARGS) tests/kernels tests/lora tests/engine

# An environment of its own, so that what the tests need elsewhere is not there. pytest's settings are its own, too.
smoke:           ## what a user without torch has: installed apart, then commands, server, adapters, dialects
	@$(MAKE) --no-print-directory VENV=.venvs/smoke .smoke

.PHONY: .smoke
.smoke: $(VENV)/.run
	@$(COMPILED) || { echo "make smoke tests the native kernels without torch, and they did not compile: nothing was tested."; exit 0; }; \
	$(PIP) install -q pytest && $(BIN)/python -m pytest -c tests/smoke/pytest.ini --confcutdir tests/smoke tests/smoke

sanitize: $(VENV)/.dev   ## native kernels under address, undefined-behaviour and thread sanitizers (ten minutes)
	@$(PIP) install -q cmake ninja nanobind && $(BIN)/python scripts/sanitize.py $(ARGS)

emulate: $(VENV)/.dev   ## AVX-512 tables out of AVX2 instructions, under the op tests (ten minutes)
	@$(PIP) install -q cmake ninja nanobind && $(BIN)/python scripts/emulate.py $(ARGS)

MINUTES ?= 10
SECONDS ?= 300
SEED    ?= 0
fuzz: $(VENV)/.dev   ## fuzz what reads model and adapter files (SECONDS=300, SEED=0; ARGS)
	@$(BIN)/python tests/fuzz/fuzz_readers.py --seconds $(SECONDS) --seed $(SEED) $(ARGS)

soak: $(VENV)/.dev   ## a server under 1,000 adapters for ten minutes, every answer checked (MINUTES=10; ARGS)
	@$(BIN)/python benchmarks/soak.py --seconds $$(( 60 * $(MINUTES) )) $(ARGS)

parity: $(VENV)/.dev   ## every architecture x every way to cut a batch, against transformers and peft (ARGS="qwen3 --first")
	@$(TESTING) $(BIN)/python -W ignore tests/model/parity_matrix.py $(ARGS)

parity-adapters: $(VENV)/.dev   ## every kind of adapter x every way to be served, against peft, and what is refused (ARGS="llama --kind DoRA")
	@$(TESTING) $(BIN)/python -W ignore tests/lora/parity_adapters.py $(ARGS)

lint: $(VENV)/.dev   ## ruff (rules and format) and mypy --strict
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

check: test lint smoke test-slow test-triton   ## all that CI runs

fix: $(VENV)/.dev   ## let ruff mend what it can
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

bench: $(VENV)/.dev   ## each benchmark for a second, so that none rots (FULL=1: for real)
	@$(BIN)/python -m pytest -m 'slow or not slow' tests/house/test_benchmarks.py $(if $(FULL),--full)

clean:           ## remove the environment and everything made
	rm -rf $(VENV) .venvs .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis dist build
