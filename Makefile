# `make` lists the targets. Everything is installed into VENV and nothing outside it is changed.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
JOBS ?= auto

PY := $(VENV)/bin/python
# Tests run side by side, JOBS at a time, with one thread each: waiting threads would take the cores from each other.
# What several tests share is made once (--dist loadgroup). For a debugger: ARGS="-n0 --pdb".
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --maxprocesses 8 --dist loadgroup
PIP := $(PY) -m pip --disable-pip-version-check install --no-compile
# What pip would do file after file, for half a minute: Python's bytecode. Some packages have files that do not compile.
COMPILE := $(PY) -m compileall -qq -j 0 $(VENV)/lib || true
PINS := $(VENV)/constraints.txt
CPU_INDEX := https://download.pytorch.org/whl/cpu
CPP = $(shell find csrc bench -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')

.PHONY: help demo test check check-slow check-hosts hosts check-release test-triton test-cuda gpu-check bench bench-docs wheel lint format clean
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL: # pip does not share an environment with another pip

help: ## list the targets
	@echo "usage: make TARGET [PYTHON=python3] [VENV=.venv] [ARGS=...]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-11s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.demo $(VENV)/.kernels ## install, then train a small VAE; ARGS go to examples/train_vae.py
	@echo "== Training a small VAE: examples/train_vae.py $(ARGS)"
	@$(PY) examples/train_vae.py $(ARGS)

test: $(VENV)/.dev ## install, then prove the library, in minutes; ARGS go to pytest, e.g. ARGS="-k sigma -x"
	@echo "== Running the tests: pytest $(ARGS)"
	@$(PYTEST) $(ARGS)

check: check-slow test-triton test-cuda ## all tests that `make test` leaves out, but those before a release

check-slow: $(VENV)/.dev ## of `make check`: machine code, instruction sets, wheel, examples; ARGS go to pytest
	@echo "== Running the slower tests: pytest --tier=check $(ARGS)"
	@$(PYTEST) --tier=check $(ARGS)

test-triton: $(VENV)/.dev ## of `make check`: the Triton kernels, in Triton's interpreter; ARGS go to pytest
	@echo "== Running the Triton kernels in their interpreter: pytest $(ARGS)"
	@TRITON_INTERPRET=1 $(PYTEST) $(ARGS)

test-cuda: $(VENV)/.dev ## of `make check`: the CUDA kernels, as CPU code and, where nvcc is, as GPU code
	@echo "== Running the CUDA kernels as CPU code: pytest $(ARGS)"
	@PYTHONPATH="tests:$$PYTHONPATH" $(PYTEST) -p cuda_plugin $(ARGS)

check-hosts: ## the loss in diffusers, Lightning, accelerate and pythae, in an environment of its own; ARGS go to pytest
	@$(MAKE) --no-print-directory VENV=$(VENV)-hosts hosts

hosts: $(VENV)/.hosts
	@echo "== Running the tests in other people's training code: pytest --tier=hosts $(ARGS)"
	@OMP_NUM_THREADS=1 $(PY) -m pytest --tier=hosts $(ARGS) tests/hosts # not side by side: the imports are what takes long

check-release: $(VENV)/.dev ## what only a release needs: every GPU target's machine code, what examples train for minutes
	@echo "== Running what a release needs: pytest --tier=release $(ARGS)"
	@$(PYTEST) --tier=release $(ARGS)
	@TRITON_INTERPRET=1 $(PYTEST) --tier=release $(ARGS)
	@PYTHONPATH="tests:$$PYTHONPATH" $(PYTEST) -p cuda_plugin --tier=release $(ARGS)

gpu-check: $(VENV)/.dev ## on a machine with a GPU: values, benchmark, tests, in a given time; ARGS="--budget 480", in seconds
	@echo "== Checking on the GPU: bench/proof/gpu_check.py $(ARGS)"
	@$(PY) bench/proof/gpu_check.py $(ARGS)

bench: $(VENV)/.dev ## time the loss beside what it replaces; ARGS go to bench/run.py, e.g. ARGS=--quick
	@echo "== Benchmark: bench/run.py $(ARGS)"
	@$(PY) bench/run.py $(ARGS)

bench-docs: $(VENV)/.dev ## render the results pages; ARGS=--from=runs/bench takes a new run's results, --from=runs/gpu a GPU's
	@$(PY) bench/report.py $(ARGS)

wheel: $(VENV)/.dev ## a wheel with the compiled libraries inside, in dist/; ARGS go to .ci/make_wheel.py
	@echo "== Building the wheel: .ci/make_wheel.py $(ARGS)"
	@$(PY) .ci/make_wheel.py $(ARGS)

lint: $(VENV)/.dev ## check style and types, changing nothing
	@echo "== ruff check"
	@$(PY) -m ruff check .
	@echo "== ruff format --check"
	@$(PY) -m ruff format --check .
	@echo "== pyright"
	@$(PY) -m pyright --pythonpath $(PY)
	@echo "== clang-format --dry-run"
	@$(if $(CPP),$(VENV)/bin/clang-format --dry-run -Werror --ferror-limit=20 $(CPP))

format: $(VENV)/.dev ## rewrite Python and C++ in the project's style
	@$(PY) -m ruff check --fix-only .
	@$(PY) -m ruff format .
	@$(if $(CPP),$(VENV)/bin/clang-format -i $(CPP))

clean: ## remove .venv, .venv-hosts, build leftovers and caches; results in runs/ stay
	rm -rf .venv .venv-hosts build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path ./.git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# An empty file in VENV marks each finished step, so that a second run costs nothing, and a change of the requirements
# or an interrupted step runs it again.

# Without Triton, a gigabyte that a CPU has no use for: PyTorch's CUDA builds, which need it, bring it themselves.
$(VENV)/.demo: EXTRA := examples
$(VENV)/.hosts: EXTRA := hosts
$(VENV)/.demo $(VENV)/.hosts: $(VENV)/.torch pyproject.toml
	@echo "== Installing fused_elbo with what the $(EXTRA) need (a minute or two, the first time)"
	@$(PIP) -qq --no-deps -e .
	@$(PY) .ci/requirements.py --extra $(EXTRA) --without triton > $(VENV)/$(EXTRA).txt
	@$(PIP) -qq --no-warn-conflicts -c $(PINS) -r $(VENV)/$(EXTRA).txt # Triton is missed on purpose
	@$(COMPILE)
	@touch $@

$(VENV)/.kernels: $(VENV)/.demo
	@echo "== Compiling the kernels, once: seconds, or up to a minute on a slow machine"
	@$(PY) -m fused_elbo
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	@echo "== Installing fused_elbo with the development tools (minutes, the first time)"
	@$(PIP) -qq -c $(PINS) -e '.[dev]'
	@$(COMPILE)
	@touch $@

# On Linux, PyPI's torch is a CUDA build of several gigabytes. Without a GPU, PyTorch's own index is asked as well:
# its 2.x.y+cpu counts as newer than PyPI's 2.x.y. Where that index cannot be reached pip goes on without it.
# --no-deps, so that this one package alone is looked for there; the next step brings what torch needs.
#
# A CUDA build requires one Triton release: the pin is left out there.
$(VENV)/.torch: constraints.txt | $(PY)
	@if [ "$$(uname -s)" != Linux ]; then \
		echo "== Installing PyTorch from PyPI"; \
		$(PIP) -c constraints.txt --no-deps torch; \
	elif nvidia-smi >/dev/null 2>&1; then \
		echo "== NVIDIA GPU found: installing PyTorch with CUDA from PyPI (gigabytes, the first time)"; \
		$(PIP) -c constraints.txt --no-deps torch; \
	else \
		echo "== No NVIDIA GPU found: installing a CPU build of PyTorch (about 200 MB, the first time)"; \
		$(PIP) -c constraints.txt --no-deps --retries 1 --timeout 15 --extra-index-url $(CPU_INDEX) torch; \
	fi
	@if $(PY) -c 'import importlib.metadata as m; exit(not any(r.startswith("triton") for r in m.requires("torch")))'; \
		then grep -v '^triton' constraints.txt; else cat constraints.txt; fi > $(PINS)
	@touch $@

$(PY):
	@$(PYTHON) -c 'import sys; exit(sys.version_info < (3, 10))' || \
		{ echo "fused_elbo needs Python 3.10 or newer, and $(PYTHON) is not: make $(MAKECMDGOALS) PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "$(PYTHON) has no venv module (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	@echo "== Creating the virtual environment $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
