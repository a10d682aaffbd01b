# SPDX-License-Identifier: Apache-2.0
# Every target does the set-up that it needs; `make help` lists them.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
USE_SYSTEM_PYTHON ?=
SUITE ?= all
BUDGET ?= 30
DEVICE ?= cpu
DATA ?= ../shared/data
ARCH ?= $(shell uname -m)
TORCH ?=

# The set-up is complete if this file exists, is newer than its prerequisites, and $(IS_SOUND) succeeds. `make demo` alone
# asks for less, for which a file of its own stands, or this one.
READY := $(VENV)/.mvit_kernels-ready
READY_FOR_DEMO := $(VENV)/.mvit_kernels-ready-for-demo
# What is asked for that needs the compiled libraries; the set-up then compiles them while pip installs the rest.
COMPILED := $(filter test test-elsewhere examples bench bench-regressions build,$(MAKECMDGOALS))

ifeq ($(USE_SYSTEM_PYTHON),1)
PY := PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON)
else
PY := $(abspath $(VENV))/bin/python
endif

.DEFAULT_GOAL := help
.PHONY: help demo examples test test-targets test-elsewhere test-oldest test-interpreted test-emulated test-compiled gate executed sanitize sanitize-gpu bench bench-regressions report docs \
	lint format build wheel test-wheel setup setup-for-demo clean

help:
	@echo 'make demo     accelerate and freeze MobileViT, show that the numbers agree, and measure the speedup'
	@echo 'make examples train a classifier, a detector and a segmentation network on the photos in DATA, accelerated and plain'
	@echo 'make test     lint, build, and run the whole test suite'
	@echo 'make sanitize the C++ operators under AddressSanitizer and UndefinedBehaviorSanitizer'
	@echo 'make sanitize-gpu  every GPU kernel under compute-sanitizer, on tiny shapes; needs a GPU'
	@echo 'make test-interpreted  the operators'"'"' whole suites on the Triton kernels, in Triton'"'"'s interpreter (minutes)'
	@echo 'make test-emulated  the same on the CUDA kernels, their source run on the CPU (a minute)'
	@echo 'make test-compiled  the operators on the PTX that Triton and nvcc compile of the kernels, executed on the CPU (minutes)'
	@echo 'make test-targets  the files that export writes for LiteRT and ExecuTorch, with libraries of 1.1 GB (minutes)'
	@echo 'make test-elsewhere  the tests that measure errors, compared with a PyTorch that works as on other x86 machines (minutes)'
	@echo 'make test-oldest  csrc/ compiled with the headers of the oldest PyTorch that is supported (downloads 0.9 GB, twice)'
	@echo 'make gate     compile every Triton and CUDA kernel for every architecture anew: tests/data/*_gate.csv (minutes)'
	@echo 'make executed  count the instructions that compiled kernels execute: tests/data/executed.csv (minutes)'
	@echo 'make bench    measure every suite in BUDGET minutes, into benchmarks/results/<device>/'
	@echo 'make report   the README'"'"'s headline, docs/benchmarks.md and the plots from the committed results'
	@echo 'make docs     the documentation as a site, into build/docs/index.html; a warning is an error'
	@echo 'make bench-regressions  the CPU path under pytest-benchmark, compared with the previous run (by hand)'
	@echo 'make lint     ruff: rules and format; mypy: types;  make format  fixes what can be fixed automatically'
	@echo 'make build    compile csrc/ into mvit_kernels/lib; an error if something is missing'
	@echo 'make wheel    a wheel for every Python and torch, and an sdist, into dist/; ARCH=aarch64 compiles for another processor'
	@echo 'make test-wheel  the wheel in dist/ in a clean environment of PYTHON, with TORCH=2.10.0 or the newest'
	@echo 'make setup    create $(VENV) and install everything as pinned in constraints.txt'
	@echo 'make clean    remove what was built; the environment stays (rm -r $(VENV) removes that)'
	@echo
	@echo 'Each does the set-up it needs, and is quick when there is nothing to do. Variables:'
	@echo '  PYTHON=python3        the Python that $(VENV) is created with, 3.10 or newer'
	@echo '  VENV=.venv            the environment'"'"'s folder'
	@echo '  PYTEST_ARGS=...       handed to pytest: PYTEST_ARGS="-k freeze -x"'
	@echo '  DATA=../shared/data   of make examples: the folder that has land_use, raccoon and camvid'
	@echo '  BUDGET=30, SUITE=all, DEVICE=cpu   of make bench: minutes, suites (operators,models,...), cpu or cuda'
	@echo '  USE_SYSTEM_PYTHON=1   use PYTHON without changes: no environment, nothing installed, built in place'
	@echo '  CXX, MAX_JOBS         the C++ compiler, and how many files are compiled at once'
	@echo '  CUDA_HOME, TORCH_CUDA_ARCH_LIST  the CUDA toolkit, and the GPUs it compiles for (8.0;9.0+PTX)'
	@echo 'pip'"'"'s own settings (PIP_INDEX_URL, PIP_FIND_LINKS, ...) apply: they decide which build of torch is installed.'

# nvcc takes two minutes, for kernels that no machine without a GPU runs. A CUDA library that is there stays.
demo: setup-for-demo
	@if [ -n "$$MVIT_KERNELS_BUILD_LIBRARIES" ] || [ -e /dev/nvidiactl ] || [ -e mvit_kernels/lib/libmvit_kernels_cuda.so ]; \
	then $(PY) setup.py -q build_native --inplace; \
	else MVIT_KERNELS_BUILD_LIBRARIES=cpu $(PY) setup.py -q build_native --inplace; fi
	@$(PY) -m mvit_kernels demo

examples: build
	@$(PY) examples/real_data.py '$(DATA)'

# One process per core, each running whole files: tests use one thread, and the tests of a file share its fixtures.
# Where a test ends its process, the run ends without that process's other tests: with a new process xdist waits for ever.
IN_PARALLEL = $$($(PY) -c 'import xdist; print("-n auto --dist loadfile --no-loadscope-reorder --max-worker-restart=0")' 2>/dev/null)

test: lint build
	@$(PY) -m pytest -q $(IN_PARALLEL) $(PYTEST_ARGS)

sanitize: setup
	@$(PY) -m pytest -q tests/gates/under_sanitizers.py
	@cd tests && $(PY) -m gates.sanitized pytest $(PYTEST_ARGS)

sanitize-gpu: setup
	@$(PY) -m pytest -q -rs tests/gates/under_compute_sanitizer.py $(PYTEST_ARGS)

test-interpreted: setup
	@TRITON_INTERPRET=1 $(PY) -m pytest -q $(wildcard tests/gates/interpreted*.py) tests/ops/test_batch_norm_activation.py \
		tests/ops/test_equal_rows.py tests/ops/test_leaves.py tests/ops/test_linear_residual.py tests/ops/test_layer_norm_linear.py \
		tests/ops/test_layer_norm_mlp.py tests/ops/test_patch_attention.py tests/ops/test_layer_norm.py \
		tests/ops/test_transformer_layer.py tests/ops/test_inverted_residual.py tests/backends/test_gpu.py -k "triton or interpreted or gpu" $(PYTEST_ARGS)

test-emulated: setup
	@MVIT_KERNELS_EMULATED=1 $(PY) -m pytest -q tests/ops/test_linear_residual.py tests/ops/test_layer_norm_linear.py \
		tests/ops/test_layer_norm_mlp.py tests/ops/test_patch_attention.py tests/ops/test_transformer.py \
		tests/ops/test_inverted_residual.py tests/ops/test_equal_rows.py tests/ops/test_leaves.py tests/ops/test_fuzz.py \
		-k "cuda or random" $(PYTEST_ARGS)

test-compiled: setup
	@MVIT_KERNELS_COMPILED=1 TRITON_CACHE_DIR="$(CURDIR)/build/triton" $(PY) -m pytest -q tests/gates/compiled.py tests/gates/compiled_cuda.py $(PYTEST_ARGS)

# PyTorch's libraries limited to AVX-512 without AMX, to AVX2, and to SSE4.2. PyTorch's own errors, which ours are compared
# with, differ by a factor of four between them; a correct result passes on all. Each run gets its own Inductor cache, whose
# key does not contain the capability: code generated for AVX-512 would run, and give wrong results, in an AVX2 run.
NO_AMX := ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16
AS_AVX2 := ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2
AS_SSE := ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2 ONEDNN_MAX_CPU_ISA=SSE41

test-elsewhere: build
	@for settings in '$(NO_AMX)' '$(AS_AVX2)' '$(AS_SSE)'; do echo "--- $$settings"; \
	env $$settings TORCHINDUCTOR_CACHE_DIR="$$(mktemp -d)" $(PY) -m pytest -q $(IN_PARALLEL) \
		$$(grep -rlE 'support.tolerance|support.checks|support.operator_tests|verify' tests --include='test_*.py' | grep -vE 'backends/(cuda|triton)|test_gpu') $(PYTEST_ARGS) || exit 1; done

# Their libraries want other versions of some than the tests do: an environment of their own, before that of the tests.
TARGETS := build/targets
SITE_PACKAGES := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'

test-targets: setup $(TARGETS)/.ready
	@PYTHONPATH="$(CURDIR)" $(TARGETS)/bin/python -m pytest -q tests/gates/exported.py $(PYTEST_ARGS)

$(TARGETS)/.ready: tests/gates/exported.txt
	@$(PY) -m venv --clear $(TARGETS)
	@$(PY) $(SITE_PACKAGES) >"$$($(TARGETS)/bin/python $(SITE_PACKAGES))/tests.pth"
	@$(TARGETS)/bin/python -m pip install --no-compile -r tests/gates/exported.txt
	@touch $@

test-oldest: setup
	@$(PY) -m pytest -q tests/gates/oldest_torch.py tests/packaging/test_oldest_torch.py $(PYTEST_ARGS)

gate: setup
	@cd tests && TRITON_CACHE_DIR="$(CURDIR)/build/triton" $(PY) -m gates.triton_gate
	@cd tests && TRITON_CACHE_DIR="$(CURDIR)/build/triton" $(PY) -m gates.triton_networks
	@cd tests && $(PY) -m gates.cuda_gate

executed: setup
	@cd tests && TRITON_CACHE_DIR="$(CURDIR)/build/triton" $(PY) -m gates.executed

bench: build
	@$(PY) -m mvit_kernels bench --suite $(SUITE) --budget $(BUDGET) --device $(DEVICE)

bench-regressions: build
	@$(PY) -m pytest -q benchmarks/regressions.py --benchmark-autosave --benchmark-compare $(PYTEST_ARGS)

report: setup
	@$(PY) benchmarks/report.py

# -E: from scratch, which takes seconds; what is kept has old navigation. -n: a reference that leads nowhere is a warning.
docs: setup
	@$(PY) -m sphinx -q -E -b html -n -W --keep-going docs build/docs
	@echo 'file://$(CURDIR)/build/docs/index.html'

build: setup
	@MVIT_KERNELS_BUILD=require $(PY) setup.py -q build_native --inplace

wheel: setup
	@$(PY) release/wheel.py --arch '$(ARCH)'

test-wheel:
	@$(PYTHON_IS_NEW_ENOUGH)
	@$(PYTHON) release/try_wheel.py --torch '$(TORCH)'

ifeq ($(USE_SYSTEM_PYTHON),1)

lint: setup
	@if $(PY) -m ruff --version >/dev/null 2>&1; then $(PY) -m ruff check . && $(PY) -m ruff format --check .; \
	else echo 'lint: skipped, $(PYTHON) has no ruff'; fi
	@if $(PY) -m mypy --version >/dev/null 2>&1; then $(PY) -m mypy; else echo 'lint: no types checked, $(PYTHON) has no mypy'; fi

setup:
	@$(PYTHON_IS_NEW_ENOUGH)
	@$(PY) -c 'import torch, setuptools' || { \
		echo 'error: USE_SYSTEM_PYTHON=1 installs nothing, and $(PYTHON) lacks the module named above' >&2; exit 1; }

setup-for-demo: setup

else

lint: setup
	@$(PY) -m ruff check -q . && $(PY) -m ruff format -q --check . || { \
		echo 'lint: `make format` fixes what can be fixed automatically' >&2; exit 1; }
	@$(PY) -m mypy --no-error-summary

setup:
	@if [ -e '$(READY)' ] && ! $(PY) -I -c "$$IS_SOUND" constraints.txt; then \
		echo '--- $(VENV) is not what the set-up left (see above): setting it up again'; rm -f '$(READY)'; fi
	@$(MAKE) --no-print-directory --silent $(READY) COMPILED='$(COMPILED)'

# A whole set-up serves as well, if it is sound. One for the demo is checked for what it left, which its file lists.
setup-for-demo:
	@if [ -e '$(READY)' ]; then $(MAKE) --no-print-directory --silent setup; \
	else \
		if [ -e '$(READY_FOR_DEMO)' ] && ! $(PY) -I -c "$$IS_SOUND" constraints.txt '$(READY_FOR_DEMO)'; then \
			echo '--- $(VENV) is not what the set-up left (see above): setting it up again'; rm -f '$(READY_FOR_DEMO)'; fi; \
		$(MAKE) --no-print-directory --silent $(READY_FOR_DEMO); \
	fi

endif

format: setup
	@$(PY) -m ruff check -q --fix . ; $(PY) -m ruff format .

clean:
	rm -rf build dist *.egg-info mvit_kernels/lib .pytest_cache .ruff_cache .mypy_cache .benchmarks
	find mvit_kernels tests -name __pycache__ -prune -exec rm -r {} +

# -- The environment -------------------------------------------------------------------------------------------------

define PYTHON_IS_NEW_ENOUGH
command -v $(PYTHON) >/dev/null || { \
	echo 'error: $(PYTHON) was not found: install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3' >&2; exit 1; }; \
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	echo "error: Python 3.10 or newer is needed, and $(PYTHON) is $$($(PYTHON) --version 2>&1): name another, make PYTHON=/path/to/python3" >&2; exit 1; }
endef

# Succeeds iff the environment is as a completed set-up leaves it: everything pinned is installed at its version, and the
# package is installed from this folder. The stamp file alone would remain after `pip install -U numpy`, after the folder
# was moved or copied, and after the base Python was removed.
define IS_SOUND
import importlib.metadata as metadata, json, pathlib, sys
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
# What a set-up for less than everything left, if its list is given
installed = {canonicalize_name(line.split("==")[0]) for path in sys.argv[2:] for line in open(path)}
for line in open(sys.argv[1], encoding="utf-8"):
    text = line.split("#")[0].strip()
    pin = Requirement(text) if text else None
    if not pin or pin.marker and not pin.marker.evaluate():
        continue
    try:
        version = metadata.version(pin.name)
    except metadata.PackageNotFoundError:
        if pin.name.startswith(("cuda-", "nvidia-")):  # a build of torch for the CPU alone brings none of them
            continue
        if installed and canonicalize_name(pin.name) not in installed:
            continue
        sys.exit(f"{pin.name} is not installed")
    if version not in pin.specifier:
        sys.exit(f"{pin.name} is {version} and not {pin.specifier}")
origin = json.loads(metadata.distribution("mvit_kernels").read_text("direct_url.json"))["url"]
if origin != pathlib.Path.cwd().as_uri():
    sys.exit(f"mvit_kernels is installed from {origin}")
endef
export IS_SOUND

# torch is installed first, so that everything that depends on it finds it and pip does not fetch another one.
# --no-compile: few of the 14,000 Python files that are installed are ever imported, and importing compiles them anyway.
$(READY): EXTRA := dev
$(READY_FOR_DEMO): EXTRA := demo
$(READY) $(READY_FOR_DEMO): constraints.txt pyproject.toml setup.py mvit_kernels/__init__.py
	@$(PYTHON_IS_NEW_ENOUGH)
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo 'error: $(PYTHON) has no venv module: install it (Debian, Ubuntu: apt install python3-venv), or name another Python: make PYTHON=/path/to/python3' >&2; exit 1; }
	@if [ -d '$(VENV)' ] && [ ! -e '$(VENV)/pyvenv.cfg' ] && [ -n "$$(ls -A '$(VENV)')" ]; then \
		echo 'error: VENV=$(VENV) is a folder but not a virtual environment: name another, make VENV=/path/to/new' >&2; exit 1; fi
	@rm -f $(READY) $(READY_FOR_DEMO)
	@echo '--- environment: $(VENV)'
	@$(PY) -c 'import pip, sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || $(PYTHON) -m venv --clear '$(VENV)'
	@echo '--- torch'
	@$(PY) -m pip install --no-compile -c constraints.txt torch setuptools cmake ninja
	@echo '--- mvit_kernels[$(EXTRA)]'
	@$(MAKE) --no-print-directory --silent -j2 the-rest EXTRA=$(EXTRA) $(if $(COMPILED),libraries-meanwhile)
	@$(PY) -m pip check
	@$(PY) -m pip list --format=freeze --disable-pip-version-check >'$@'

.PHONY: the-rest libraries-meanwhile
the-rest:
	@MVIT_KERNELS_BUILD=skip $(PY) -m pip install --no-compile -c constraints.txt --no-build-isolation -e '.[$(EXTRA)]'

# `build` comes after it, finds nothing to do, or fails again and says why.
libraries-meanwhile:
	@MVIT_KERNELS_BUILD=auto $(PY) setup.py -q build_native --inplace >/dev/null 2>&1 || true
