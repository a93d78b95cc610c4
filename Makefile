# SPDX-License-Identifier: Apache-2.0
# Each target sets up all it needs. PYTHON names the interpreter to start from (3.11 or newer).
#   make demo | test | lint     in .venv, with the versions of constraints.txt
#   make gpu-test | bench       (BENCH_ARGS="--op fisher --json DIR") with the interpreter's own torch where it sees CUDA, else in .venv
PYTHON ?= python3
VENV := .venv
GPU_VENV := .venv-gpu
EXTRAS := train,cli,report,dev
BUILD_TOOLS := setuptools cmake ninja pybind11
SOURCES := constraints.txt pyproject.toml setup.py CMakeLists.txt \
	$(shell find csrc python_bindings -type f -name '*.[chp]*' -o -type f -name '*.cu' 2>/dev/null)
STAMP := $(VENV)/.installed
GPU_STAMP := $(GPU_VENV)/.installed
FORMATTED_CPP := $(shell find csrc python_bindings bench/micro -type f \( -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' \))
SEES_CUDA := $(PYTHON) -c "import sys, torch; sys.exit(not torch.cuda.is_available())" 2>/dev/null

# Two cores are all that CI has: one thread a test process, as many processes as cores.
export OMP_NUM_THREADS ?= 1
TEST_JOBS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: demo test lint format gpu-test bench clean

demo: $(STAMP)
	OMP_NUM_THREADS=$(TEST_JOBS) $(VENV)/bin/obs-kernels demo $(DEMO_ARGS)

test: $(STAMP)
	$(VENV)/bin/python -m bench.gpu_report --check
	$(VENV)/bin/python -m pytest -q -n $(TEST_JOBS) --dist worksteal -m "not gpu" tests

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(FORMATTED_CPP)

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(FORMATTED_CPP)

$(STAMP): $(SOURCES)
	@echo "setting up $(VENV) (some minutes the first time)"
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "obs_kernels needs Python 3.11 or newer; run make PYTHON=python3.12"; exit 1; }
	@$(VENV)/bin/pip install -q --disable-pip-version-check -c constraints.txt torch $(BUILD_TOOLS)
	@$(VENV)/bin/pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[$(EXTRAS)]"
	@touch $@

# --- GPU machines: no downloads, the interpreter's own packages through a venv that sees them -----------------------

gpu-test bench: GPU_PYTHON = $(shell $(SEES_CUDA) && echo $(GPU_VENV)/bin/python || echo $(VENV)/bin/python)

gpu-test: gpu-env
	OBS_KERNELS_REQUIRE_GPU=1 OMP_NUM_THREADS=8 $(GPU_PYTHON) -m bench.gpu_report $(GPU_REPORT_ARGS)

bench: gpu-env
	$(GPU_PYTHON) -m bench.run $(BENCH_ARGS)

.PHONY: gpu-env
gpu-env:
	@if $(SEES_CUDA); then $(MAKE) --no-print-directory $(GPU_STAMP); else $(MAKE) --no-print-directory $(STAMP); fi

$(GPU_STAMP): $(SOURCES)
	@test -x $(GPU_VENV)/bin/python || $(PYTHON) -m venv --without-pip --system-site-packages $(GPU_VENV)
	@$(PYTHON) -c "import site, glob; \
		paths = [p for p in site.getsitepackages()]; \
		open(glob.glob('$(GPU_VENV)/lib/python3*/site-packages')[0] + '/parent.pth', 'w').write('\n'.join(paths) + '\n')"
	$(GPU_VENV)/bin/python setup.py build_ext --inplace
	@touch $@

clean:
	rm -rf build $(VENV) $(GPU_VENV) obs_kernels/*.so obs_kernels/_build_info.json *.egg-info
