PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip
# The demo needs few packages and the CPU engine, all else every package and whatever kernels can be built.
DEMO := $(VENV)/.demo
READY := $(VENV)/.ready
BUILT_FROM = pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
CXX_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')
# Python compiles what is imported by itself: compiling all of torch at once takes longer than fetching it.
INSTALL := $(PIP) install -q --no-compile
DEMO_PACKAGES = $(shell sed -n 's/^demo = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d '",')
# The plain torch of some indexes drags in gigabytes of CUDA; what is installed first, the package leaves in place.
TORCH ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo torch || echo torch==2.13.0)

# Processes for all cores. Their threads wait without spinning, on cores that another process needs.
PYTEST := OMP_WAIT_POLICY=passive $(PY) -m pytest -n auto --dist worksteal

RESULTS_DIR ?= out/gpu
CASES ?= 100000
SEED ?= 0
MINUTES ?= 60
WHEELS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export OTALIGN_REQUIRE_EXT := 1

.PHONY: help demo study test test-all fuzz fuzz-c sanitize aarch64 lint docs bench gpu wheel clean

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(DEMO)  ## train a small aligner on real speech, end with a picture and its errors
	$(PY) examples/demo/demo.py

study: $(READY)  ## the papers' claims in small on synthesised speech: docs/study.md anew, the better part of an hour; needs espeak-ng and flite
	$(PY) -m examples.study

test: $(READY)  ## the tests and doctests that take up to five minutes on two cores
	$(PYTEST) --doctest-modules -m "not slow and not gpu" tests otalign

test-all: $(READY)  ## every test that needs no GPU, the engine's under sanitizers, and whether planted faults are found
	$(PYTEST) --doctest-modules -m "not gpu" tests otalign
	$(MAKE) sanitize
	$(PY) tests/plant_faults.py

# Two thousand cases of each GPU backend take as long as a hundred thousand of the CPU engine. SEED=1 draws others.
fuzz: $(READY)  ## 100,000 random problems against a float64 oracle on the CPU engine, 2,000 on each other backend: over an hour
	OMP_NUM_THREADS=1 $(PY) -m tests.fuzz --backend cpu --cases $(CASES) --seed $(SEED) --report out/fuzz/cpu.csv
	for backend in reference triton cuda; do \
	  OMP_NUM_THREADS=1 $(PY) -m tests.fuzz --backend $$backend --cases 2000 --seed $(SEED) \
	    --report out/fuzz/$$backend.csv || exit 1; done

fuzz-c:  ## MINUTES=60 of libFuzzer on the structs that the CPU engine takes; needs Debian's clang
	tests/backends/engine/fuzz.sh $$(($(MINUTES) * 60))

sanitize: $(READY)  ## the engine's tests on a build with AddressSanitizer and UBSan; its shared items and the corpus of problems that lie under ThreadSanitizer
	tests/backends/engine/races.sh $(CXX)
	tests/backends/engine/replay.sh $(CXX) address,undefined
	tests/backends/engine/replay.sh $(CXX) thread
	rm -rf build/sanitize
	OTALIGN_BUILD_CUDA=0 CMAKE_ARGS=-DOTALIGN_SANITIZE=address,undefined \
	  $(PIP) install -q --no-deps --target build/sanitize .
	OTALIGN_EXT_DIR=build/sanitize/otalign ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  $(PYTEST) -m "not slow and not gpu" -k "(cpu or engine or accelerate or long_items) and not random_problems" tests

aarch64:  ## the engine compiled for aarch64, under an emulator; needs Debian's g++-aarch64-linux-gnu and qemu-user
	tests/backends/engine/run.sh aarch64-linux-gnu-g++ qemu-aarch64 -L /usr/aarch64-linux-gnu

lint: $(READY)  ## ruff, mypy, clang-format, and the schema of workflows
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)
	$(PY) -m check_jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

docs: $(READY)  ## the documentation as a site in out/site, links checked
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

bench: $(READY)  ## the tables of times against the alternatives
	$(PY) benchmarks cpu
	$(PY) benchmarks small-reg

# On a machine with a GPU its own Python is used, whose torch and Triton fit the driver; DRY=1 rehearses here, in the venv.
gpu: $(if $(DRY),$(READY))  ## on a GPU: build, test, time, sanitize, within ten minutes; QUICK=1 in three; STEPS=first,tests; DRY=1 rehearses on the CPU
	$(if $(DRY),$(PY),$(PYTHON)) benchmarks session --out $(RESULTS_DIR) $(if $(WHEELS),--wheels $(WHEELS)) \
	  $(if $(DRY),--dry) $(if $(QUICK),--quick) $(if $(STEPS),--steps "$(STEPS)")

# The newest wheel alone is installed, beside torch, where nothing of this checkout is seen.
wheel: $(READY)  ## a wheel for this Python in dist/, manylinux on Linux, tried in an empty environment
	rm -rf build
	$(PIP) wheel -q --no-deps -w build/wheel .
	if [ "$$(uname)" = Linux ]; then \
	  PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -m auditwheel repair -w dist build/wheel/*.whl; \
	else mkdir -p dist && cp build/wheel/*.whl dist; fi
	$(PYTHON) -m venv build/empty
	build/empty/bin/python -m pip install -q $(TORCH)
	build/empty/bin/python -m pip install -q "$$(ls -t dist/*.whl | head -n 1)"
	cd build/empty && bin/python -m otalign && bin/python ../../tests/helpers/programs/one_loss.py

clean:  ## remove whatever these targets made
	rm -rf $(VENV) build dist out *.egg-info otalign/_C*.so otalign/_build_info.py
	rm -rf .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

define VENV_WITH_TORCH
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -c "import importlib.util as u, sys; sys.exit(not u.find_spec('torch'))" || $(INSTALL) $(TORCH)
endef

# Without the package's own dependencies: these have Triton, a gigabyte that only GPUs use, where torch brings it.
$(DEMO): $(BUILT_FROM)
	$(VENV_WITH_TORCH)
	$(INSTALL) $(DEMO_PACKAGES)
	OTALIGN_BUILD_CUDA=0 $(INSTALL) --no-deps -e .
	touch $@

# What it builds serves the demo as well; the other way round the stamp of this one stays old.
$(READY): $(BUILT_FROM)
	$(VENV_WITH_TORCH)
	$(INSTALL) -e ".[dev]"
	touch $@ $(DEMO)
