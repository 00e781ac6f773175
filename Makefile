# The front door: `make demo` and `make test` are whole commands on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DONE := $(VENV)/.installed
# Four files at a time, on two cores, those of the Slurm cluster first: they wait more than they compute.
PYTEST := $(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder

.PHONY: help install demo test test-fast chaos lint ui clean

help:
	@echo "make demo       real clips -> latents -> 2-rank ZeRO-2 training -> videos -> FVD -> MLflow"
	@echo "make test       lint, types and every test (test-fast leaves out the slow ones)"
	@echo "make chaos      a run on a real Slurm of this machine, hit by 30 random failures"
	@echo "make ui         look at the runs in MLflow, on http://127.0.0.1:5000"
	@echo "make install    the virtual environment alone, in $(VENV)"
	@echo "make lint       ruff and mypy"

install: $(DONE)

$(DONE): setup.cfg pyproject.toml constraints.txt
	@./tools/install.sh "$(PYTHON)" $(VENV)
	@touch $(DONE)

demo: install
	$(BIN)/python launchers/demo.py

test: lint
	$(PYTEST)

test-fast: lint
	$(PYTEST) -m "not slow"

chaos: install
	$(BIN)/python -m tests.slurm.chaos --events $(or $(EVENTS),30) $(if $(SEED),--seed $(SEED))

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

ui: install
	$(BIN)/fvdm ui

clean:
	rm -rf demo runs/demo build *.egg-info
