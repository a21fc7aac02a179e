# make demo, make test: each does its own set-up, on a machine with Python 3.10+, make and a C++ compiler.
PYTHON ?= python3
VENV ?= .venv
ARCHITECTURES ?= release
KERNELS ?= ON
OUT ?= benchmarks/results

bin := $(VENV)/bin
pip := $(bin)/python -m pip --disable-pip-version-check
torch := $(shell sed -n 's/^torch==//p' constraints.txt)
setup := $(VENV)/.setup
build := $(VENV)/.build
sources := pyproject.toml CMakeLists.txt $(shell find csrc -type f)
cpp := $(filter %.h %.cpp %.cu,$(shell find csrc tests/emulator -type f))

.PHONY: help demo test emulator sanitize lint format nightly build wheel sdist test-wheel gpu-check clean
help:
	@echo "make demo       generate text with the embedded model"
	@echo "make test       lint and test, what CI runs        make nightly    the tests that take long"
	@echo "make format     format Python and C++              make build      compile csrc/ again"
	@echo "make emulator   compile csrc/ for the CPU          make sanitize   its tests under sanitizers"
	@echo "make wheel      wheel in dist/, checked            make sdist      source distribution, checked"
	@echo "make gpu-check  test and measure on this machine's GPU, with the Python of PYTHON=python3;"
	@echo "                STAGE=test|bench|decode|sanitize|model for one stage, OUT=folder for the results"

demo: $(build)
	$(bin)/pyllama generate demo "If the file" --max-new-tokens 80 --repetition-penalty 1.15

test: lint emulator
	$(bin)/python -m pytest --emulator plain
	$(MAKE) sanitize

# The kernels compiled for the CPU (tests/emulator), plain and for each sanitizer.
emulator: $(setup)
	@$(bin)/cmake -S tests/emulator -B build/emulator -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(bin))/ninja \
	    -DPython_EXECUTABLE=$(abspath $(bin))/python >build/emulator.log || { cat build/emulator.log; exit 1; }
	@$(bin)/cmake --build build/emulator --target plain asan tsan conformance

# A sanitizer's library must be in the process before Python is. One OpenMP thread: torch's own threads are not instrumented.
library = $(shell $(CXX) -print-file-name=$(1))
sanitize: emulator
	LD_PRELOAD="$(call library,libasan.so) $(call library,libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 \
	    $(bin)/python -m pytest tests/ops tests/test_reader.py --emulator asan -k emulated -m "not nightly and not large"
	LD_PRELOAD="$(call library,libtsan.so)" TSAN_OPTIONS=halt_on_error=1 OMP_NUM_THREADS=1 \
	    $(bin)/python -m pytest tests/ops tests/test_reader.py --emulator tsan -k emulated -m "not nightly and not large"

lint: $(build)
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/clang-format --dry-run -Werror $(cpp)
	$(bin)/mypy

format: $(setup)
	$(bin)/ruff check --fix .
	$(bin)/ruff format .
	$(bin)/clang-format -i $(cpp)

nightly: lint
	$(bin)/python -m pytest -m nightly
	$(MAKE) test-wheel TORCH="2.10.0 $(torch) newest"

# The environment. Without a GPU, torch's CPU build: from where pip finds one, else from where uv finds it.
$(setup): constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "pyllama needs Python 3.10 or newer: make PYTHON=...")'
	@$(PYTHON) -c 'import os, sysconfig as s; p = s.get_path("include") + "/Python.h"; \
	    os.path.exists(p) or exit("The C++ compiler needs " + p + ": install your system’s package python3-dev")'
	$(PYTHON) -m venv $(VENV)
	@if nvidia-smi -L >/dev/null 2>&1; then \
	    echo "torch $(torch), for CUDA"; $(pip) install --quiet torch==$(torch); \
	else \
	    echo "torch $(torch), for the CPU"; \
	    $(pip) install --quiet torch==$(torch)+cpu 2>/dev/null || \
	    { $(pip) install --quiet uv && $(bin)/uv pip install --python $(bin)/python --torch-backend=cpu torch==$(torch); }; \
	fi
	$(pip) install --quiet --requirement constraints.txt
	@touch $@

$(build): $(setup) $(sources)
	@mkdir -p build
	$(pip) install --verbose --no-build-isolation --no-deps --editable . >build/log 2>&1 || { cat build/log; exit 1; }
	@! grep '(C75' build/log  # ptxas says so where it had to change the order of wgmma or setmaxnreg
	@$(bin)/python -c 'import torch; from pyllama import _C; print("compiled with CUDA", _C.cuda_version, "for", \
	    *_C.architectures) if _C.cuda_version else print("compiled without nvcc: no CUDA kernels, every op runs eagerly")'
	@touch $@

build: $(build)

# A wheel for release is built in an image of manylinux_2_28 with CUDA 12.9. KERNELS=OFF: as where there is no nvcc.
wheel: $(setup)
	rm -rf dist/wheel
	$(pip) wheel --quiet --no-build-isolation --no-deps --wheel-dir dist/wheel . \
	    --config-settings=cmake.define.PYLLAMA_ARCHITECTURES=$(ARCHITECTURES) \
	    --config-settings=cmake.define.PYLLAMA_KERNELS=$(KERNELS)
	$(bin)/python tests/wheel/check_file.py dist/wheel/*.whl

sdist: $(setup)
	rm -rf dist/sdist build/sdist
	$(bin)/python -c 'from scikit_build_core.build import build_sdist; build_sdist("dist/sdist")'
	$(pip) wheel --quiet --no-build-isolation --no-deps --wheel-dir build/sdist \
	    --config-settings=cmake.define.PYLLAMA_ARCHITECTURES=development dist/sdist/*.tar.gz
	$(bin)/python tests/wheel/check_file.py build/sdist/*.whl

# The wheel in fresh environments, one per version of torch: make test-wheel TORCH="2.10.0 2.13.0"
test-wheel: wheel
	$(bin)/python tests/wheel/check_torch.py dist/wheel/*.whl $(TORCH)

gpu-check:
	$(PYTHON) benchmarks/gpu_check.py --out $(OUT) $(STAGE)

clean:
	rm -rf $(VENV) build dist
