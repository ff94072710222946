# Needs Python 3.11, 3.12 or 3.13 and make; every target that wants the environment builds .venv by itself.
#   make demo DEMO_ARGS=--no-sync      make test PYTEST_ARGS='-k roles'      make venv PYTHON=/path/to/python3.12

# Asked by running it: a version manager's shim may be found and still not work.
# That of an existing .venv first, then 3.11: the whole suite runs on it.
PYTHON ?= $(shell for name in $$(sed -n 's/^executable = //p' .venv/pyvenv.cfg 2>/dev/null) python3.11 python3.12 python3.13 python3; do \
	$$name -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$name && break; done)
BIN := .venv/bin
DEMO_ARGS ?=
PYTEST_ARGS ?=
# An environment with a CUDA build of torch and SGLang, which .venv is not.
GPU_PYTHON ?= python3
GPU_ARGS ?=
FAULT_ARGS ?=
SOAK_ARGS ?=

.PHONY: help venv demo test test-loaded quick coverage docs contracts faults soak gpu lint clean

help:
	@echo 'make demo    GRPO on a real SGLang server, two training ranks, on the CPU; writes a plot to out/'
	@echo 'make test    every test that this machine can run (without CUDA: all but those marked gpu), in three processes'
	@echo 'make test-loaded  the same in one process, beside busy ones, two for each core'
	@echo 'make quick   the tests that need no server and not long, in four processes: some of them wait; under two minutes on two cores'
	@echo 'make coverage   which lines of weights/ and of the receiver the quick tests run, in all of their processes'
	@echo 'make contracts  what we rely on in SGLang, asked of the code of its releases; fetches them, the newest too'
	@echo 'make faults  every fault at every moment in every process; hours on two cores; FAULT_ARGS="--only idle/ --resume"'
	@echo 'make soak    faults from a seeded schedule under a job that goes on; SOAK_ARGS="--faults 20 --seed 1"'
	@echo 'make gpu     every kind of trainer on the GPUs of CUDA_VISIBLE_DEVICES, with the python of GPU_PYTHON; GPU_ARGS="--layouts tp2"'
	@echo 'make docs    the documentation as a site, into out/site'
	@echo 'make lint    ruff and mypy'
	@echo 'make venv    only the set-up that the others do by themselves'
	@echo 'make clean   remove .venv and everything else that is not source'

venv:
	@if [ -z "$(PYTHON)" ]; then \
		echo 'No Python 3.11, 3.12 or 3.13 found (tried python3.11, python3.12, python3.13 and python3: $(shell python3 --version 2>&1)).'; \
		echo 'Install one, or name it: make $(or $(MAKECMDGOALS),venv) PYTHON=/path/to/python3.12'; \
		exit 1; \
	fi
	@exec "$(PYTHON)" scripts/make_venv.py

demo: venv
	@mkdir -p out
	$(BIN)/torchrun --standalone --nproc-per-node 2 examples/grpo.py $(DEMO_ARGS)

test: venv
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --durations 20 --durations-min 20 $(PYTEST_ARGS)

test-loaded: venv
	$(BIN)/python scripts/under_load.py $(BIN)/python -m pytest $(PYTEST_ARGS)

quick: venv
	$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder -m 'quick and not slow and not engine and not gpu' $(PYTEST_ARGS)

# Into out/coverage; the sources and what counts are in setup.cfg.
coverage: venv
	@mkdir -p out/coverage
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest -m 'quick and not engine and not gpu' $(PYTEST_ARGS)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

# Into out/site; a warning is an error.
docs: venv
	$(BIN)/python scripts/errors_page.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

contracts: venv
	$(BIN)/python tests/contracts/fetch.py
	$(BIN)/python -m pytest -m '' tests/contracts $(PYTEST_ARGS)

faults: venv
	$(BIN)/python benchmarks/fault_matrix.py $(FAULT_ARGS)

soak: venv
	$(BIN)/python benchmarks/soak.py $(SOAK_ARGS)

gpu:
	$(GPU_PYTHON) benchmarks/gpu_matrix.py --record $(GPU_ARGS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .contracts out build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
