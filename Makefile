# Everything runs in .venv, made on first use and pinned by constraints.txt.
#   make train    fine-tune the embedded model, a few minutes on two CPU cores
#   make test     the whole test suite             make quick   the fast part of it
#   make check    ruff, mypy, layers, budgets      make docs    write the generated docs anew
#   make matrix   every method on every base under every engine, and docs/matrix.md
#   make move     every engine and number of processes gone on with by every other: docs/moving.md
#   make soak     kill, stop, fill and flip for 20 minutes; nothing may be lost
#   make gpu      the checks that need a GPU       make pin     write constraints.txt anew
#   make gpu-speed  training speed and memory on a GPU, beside the plan and beside peers
#   make slurm    install SLURM for its tests (Debian or Ubuntu, as root)
#   make clean    remove what make made
# Arguments go in ARGS: make train ARGS="peft=full seed=1", make test ARGS="-k resume".
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := train

VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
ARGS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH_CPU := https://download.pytorch.org/whl/cpu
PINNED := pyproject.toml constraints.txt
# Processes of the suite; each test that starts ranks starts two.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: train test quick matrix soak move check gpu gpu-speed slurm docs pin clean

train: $(VENV)/.installed
	@$(BIN)/dtune train experiment=quickstart $(ARGS)

test: $(VENV)/.installed-dev
	@$(PYTEST) $(ARGS)

quick: $(VENV)/.installed-dev
	@$(PYTEST) -m "not slow" tests/unit tests/contracts $(ARGS)

# ARGS="lora nf4" runs only the cells that have one of the words in their name.
matrix: $(VENV)/.installed-dev
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.matrix.run $(ARGS)

# ARGS="lora zero3" runs only the moves that have one of the words in their name.
move: $(VENV)/.installed-dev
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.distributed.move_run $(ARGS)

check: $(VENV)/.installed-dev
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/shellcheck -x .ci/run slurm/*.sbatch benchmarks/*.sh
	$(BIN)/python -m pytest -q tests/unit/test_budgets.py

# Random faults for so many minutes: ARGS="minutes=60 seed=3 out=FILE.json"; tests/soak/run.py has all.
soak: $(VENV)/.installed-dev
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak.run $(ARGS)

# On a machine with an NVIDIA GPU: everything that waits for one, and a table.
gpu:
	@bash benchmarks/gpu_checks.sh $(ARGS)

gpu-speed:
	@bash benchmarks/gpu_speed.sh $(ARGS)

# The tests start daemons of their own; those of the packages are not started in a container. With
# iproute2 tests make hosts of network namespaces.
slurm:
	@for tool in slurmctld slurmd munged ip; do
	  PATH=$$PATH:/usr/sbin command -v $$tool >/dev/null || missing=yes
	done
	[[ -n $${missing:-} ]] || exit 0
	if [[ $$(id -u) != 0 ]]; then
	  echo "make slurm: run it as root, or have slurm-wlm, munge and iproute2 installed" >&2
	  exit 1
	fi
	apt-get -o Acquire::http::Timeout=30 -o Acquire::https::Timeout=30 update -q
	DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends slurm-wlm munge iproute2

docs: $(VENV)/.installed-dev
	@$(BIN)/python -m dtune.config.reference docs/config.md README.md
	$(BIN)/python -m dtune.bench.pages README.md docs/bench.md
	$(BIN)/python -m benchmarks.peers.table docs/peers.md

# Pins of extras that are not installed here, and that pyproject.toml names, stay as they are.
pin: $(VENV)/.installed-dev
	@$(PIP) freeze --all --exclude-editable --exclude pip | sed 's/^\(torch==[0-9.]*\).*/\1/' > $(VENV)/pins
	grep -v '^#' constraints.txt | while read -r pin; do
	  name=$${pin%%==*}
	  grep -qi "^$$name==" $(VENV)/pins || ! grep -qi "\"$$name[]>=<;~! \"]" pyproject.toml || echo "$$pin"
	done > $(VENV)/kept
	{ grep '^#' constraints.txt; cat $(VENV)/pins $(VENV)/kept | LC_ALL=C sort -f; } > $(VENV)/pinned
	mv $(VENV)/pinned constraints.txt
	rm $(VENV)/pins $(VENV)/kept

clean:
	rm -rf $(VENV) dist build .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

$(VENV)/.installed: $(VENV)/.torch $(PINNED)
	@$(PIP) install --quiet --constraint constraints.txt --editable ".[deepspeed]"
	touch $@

$(VENV)/.installed-dev: $(VENV)/.torch $(PINNED)
	@$(PIP) install --quiet --constraint constraints.txt --editable ".[deepspeed,bitsandbytes,tensorboard,wandb,search,plot,peers,dev]"
	touch $@ $(VENV)/.installed

# First and alone: the CPU index is asked for torch only, and what is installed is kept afterwards.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	@pin=$$(grep '^torch==' constraints.txt)
	if nvidia-smi -L >/dev/null 2>&1; then
	  echo "installing $$pin for CUDA into $(VENV)"
	  $(PIP) install --quiet "$$pin" --constraint constraints.txt
	else
	  echo "installing $$pin for the CPU into $(VENV)"
	  $(PIP) install --quiet --no-deps --extra-index-url $(TORCH_CPU) --retries 1 "$$pin"
	fi
	touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info < (3, 13); sys.exit(not ok and
	  f"dtune needs Python 3.11 or 3.12, $(PYTHON) is {sys.version.split()[0]}; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
