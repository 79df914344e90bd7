# make quickstart   the main job on real text, on this machine, ending with a picture and a table
# make test         the default test suite
# Both make .venv first when it is missing; `make install` does only that. All of them take PYTHON=python3.12 and VENV=DIR.
# Where everything is installed already and nothing can be: make test-gpu RUN=python3 INSTALLED=
# Several tests at a time, with pytest-xdist: make test-gpu JOBS=8

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
# One BLAS thread a process: two pytest workers, each with up to four gloo ranks, share the cores.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest
# Named, so that nothing else is imported: a GPU machine may lack what other tests need.
GPU_TESTS := tests/gpu tests/gpu_kernels tests/objective/test_logprobs.py tests/conversion/test_oracle_bridge.py
LINTED := megatron_longpo benchmarks tools tests examples setup.py $(wildcard pretrain_longpo.py)

.PHONY: help install quickstart test test-slow test-gpu bench bench-gpu lint format

help:
	@echo "make install     .venv with the locked versions (CPU build of torch where there is no CUDA)"
	@echo "make quickstart  corpus, tokenizer, model, pairs, training with TP 2 and CP 2, report (about 5 minutes on 2 cores)"
	@echo "make test        the default tests (under 4 minutes on 2 cores)"
	@echo "make test-slow   the opt-in long tests"
	@echo "make test-gpu    the tests that need a CUDA device"
	@echo "make bench       a step against its rivals over document length, on this CPU (under 10 minutes on an idle one)"
	@echo "make bench-gpu   kernels, speed, lengths and rivals on this machine's GPU; goes on where it was stopped (docs/gpu.md)"
	@echo "make lint        ruff check, ruff format --check, mypy"
	@echo "make format      let ruff fix and format"

# The stamp is newer than what it was made from, so nothing is installed twice and a changed lock is never forgotten.
$(INSTALLED): setup.py constraints.txt tools/install.sh
	@bash tools/install.sh "$(VENV)" "$(PYTHON)"
	@touch $@

install: $(INSTALLED)

quickstart: $(INSTALLED)
	@$(RUN) -m examples.quickstart.run

test: $(INSTALLED)
	$(PYTEST) -n 2 --dist loadfile

test-slow: $(INSTALLED)
	$(PYTEST) -m slow

test-gpu: $(INSTALLED)
	$(PYTEST) -m gpu $(if $(JOBS),-n $(JOBS)) $(GPU_TESTS)

bench: $(INSTALLED)
	$(RUN) -m benchmarks.suite

bench-gpu: $(INSTALLED)
	$(RUN) -m benchmarks.gpu

lint: $(INSTALLED)
	$(RUN) -m ruff check $(LINTED)
	$(RUN) -m ruff format --check $(LINTED)
	$(RUN) -m mypy

format: $(INSTALLED)
	$(RUN) -m ruff check --fix $(LINTED)
	$(RUN) -m ruff format $(LINTED)
