# make train      set up .venv and train the default model on two CPU ranks
# make test       the test suite
# make check      lint, formatting and types
# make plan       stages, balance and predicted bubble of a configuration
# make parity     every layout against one process (benchmarks/parity.py)
# make multinode  hosts in network namespaces: every launcher, a cut link, its cost (root; benchmarks/multinode.py)
# make gpu-check  tests that need a GPU, and FP8 against bf16 on it (benchmarks/gpu_precision.py)
# make clean      remove .venv and caches; runs/, sweeps/ and data/ stay
#
# ARGS are passed on: make train ARGS="mtp.depth=2 run.name=two-depths", make test ARGS="tests/model -x".
# PYTHON chooses the interpreter, TORCH_INDEX an additional package index to take torch from.

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
ARGS ?=

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
READY := $(VENV)/.ready
# CUDA builds of torch bring their own; beside a CPU build its interpreter tests our kernels.
TRITON := triton==3.6.0

# Two pips must not write to one environment at a time, whatever -j says.
.NOTPARALLEL:
.PHONY: help train test check plan parity multinode gpu-check clean

help:
	@sed -n '1,/^$$/s/^# //p' Makefile

train: $(READY)-train
	$(BIN)/dist-mtp train $(ARGS)

test: $(READY)-test
	$(BIN)/python -m pytest --durations=15 $(ARGS)

check: $(READY)-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

plan: $(READY)-train
	$(BIN)/dist-mtp plan $(ARGS)

parity: $(READY)-test
	$(BIN)/python benchmarks/parity.py $(ARGS)

multinode: $(READY)-test
	$(BIN)/python -m pytest --durations=15 tests/multinode tests/slurm $(ARGS)
	$(BIN)/python benchmarks/multinode.py

gpu-check: $(READY)-test
	@$(BIN)/python -c "import sys, torch; torch.cuda.is_available() or sys.exit(f'not run: torch {torch.__version__} finds no GPU here')"
	$(BIN)/python -m pytest -m gpu $(ARGS)
	$(BIN)/python benchmarks/gpu_precision.py

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build *.egg-info

# Stamps: set-up is done once, and again when what it depends on changes.
$(READY)-torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch"
	$(INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	@touch $@

$(READY)-train: EXTRAS := corpus,bpe
$(READY)-test: EXTRAS := test
$(READY)-dev: EXTRAS := dev
$(READY)-train $(READY)-test $(READY)-dev: $(READY)-torch pyproject.toml
	@echo "installing dist-mtp[$(EXTRAS)]"
	$(INSTALL) --editable '.[$(EXTRAS)]'
	$(if $(findstring test,$@),@$(BIN)/python -c "import triton" 2>/dev/null || $(INSTALL) $(TRITON))
	@touch $@
