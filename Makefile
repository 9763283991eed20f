# Each target makes the virtual environment and everything in it, and reuses what is there.
#   PYTHON=python3.12   the interpreter to make the environment with
#   VENV=.venv-3.12     where the environment lies
#   PGOLF_WERROR=ON     compiler warnings are errors
#   PGOLF_CUDA=on       the CUDA backend too (docs/gpu.md); without it only where there is a GPU, and nvcc, as compiling takes minutes
#   PGOLF_CUDA_ARCHITECTURES=86-real   the GPUs it is built for; this machine's, or the H100 alone where there is none;
#                       for make wheel, all that pgolf supports
#   PYTEST_ARGS="-k x"  passed on to pytest

VENV ?= .venv
PYTHON ?=
PGOLF_WERROR ?= OFF
PYTEST_ARGS ?=
GPU := $(shell nvidia-smi --list-gpus >/dev/null 2>&1 && echo yes)
# A wheel is for other machines.
WHEEL_CUDA := $(or $(PGOLF_CUDA),on)
WHEEL_ARCHITECTURES := $(or $(PGOLF_CUDA_ARCHITECTURES),all)
ifndef PGOLF_CUDA
PGOLF_CUDA := $(if $(GPU),auto,off)
endif
ifndef PGOLF_CUDA_ARCHITECTURES
PGOLF_CUDA_ARCHITECTURES := $(if $(GPU),native,90a-real)
endif
export PGOLF_CUDA PGOLF_CUDA_ARCHITECTURES
FUZZ_MINUTES ?= 10

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# The build folder outlives each pip run, so that only what changed is compiled again.
INSTALL := SKBUILD_BUILD_DIR="build/{wheel_tag}" SKBUILD_CMAKE_DEFINE="PGOLF_WERROR=$(PGOLF_WERROR)" \
    $(PIP) --no-build-isolation

# Folders are listed too: theirs is the time stamp that a removed file changes.
NATIVE := CMakeLists.txt pyproject.toml $(shell find cmake csrc ! -name '*.pyc' ! -name __pycache__)
PACKAGE := README.md $(shell find python ! -name '*.pyc' ! -name __pycache__ ! -name '*.so')

# After `make dev`, the environment runs the source tree itself, and only native code needs to be installed again.
PGOLF := $(if $(wildcard $(VENV)/.dev),$(VENV)/.dev,$(VENV)/.installed)

# `make sanitize` has a native build and a copy of the package of its own. libasan must be loaded before Python, and with
# it libstdc++, whose exceptions it watches. operator new is the library's own and ends in malloc, so that libstdc++ may
# allocate what the library frees: not a mismatch. PYTHONMALLOC shows libasan every object of Python's too.
SANITIZE_CXX ?= c++
SANITIZE := build/sanitize
SANITIZED = env PYTHONPATH=$(SANITIZE)/site PYTHONMALLOC=malloc \
    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:alloc_dealloc_mismatch=0 UBSAN_OPTIONS=print_stacktrace=1 \
    LD_PRELOAD="$$($(SANITIZE_CXX) -print-file-name=libasan.so) $$($(SANITIZE_CXX) -print-file-name=libstdc++.so)" \
    $(BIN)/python

# Tests of what is installed rather than of mathematics, for `make test-wheel`.
WHEEL_TESTS := $(addprefix tests/test_,package.py recipes.py doctor.py cuda_library.py)

.PHONY: help demo test test-isa test-bits dev wheel test-wheel lint sanitize fuzz mutants check-all clean
.NOTPARALLEL:  # one pip at a time

help:
	@echo "make demo    train, squeeze and score a small model on this machine's own documentation (minutes)"
	@echo "make test    run all tests"
	@echo "make dev     install for development: Python changes apply at once, C++ changes after make dev"
	@echo "make wheel   a wheel for other machines, with the code of all supported GPUs, in dist/ (half an hour)"
	@echo "make test-wheel  install it where there is no compiler, and run it"
	@echo "make lint    check style, types and stubs"
	@echo "make test-isa  run all tests on each instruction set: plain, AVX2, AVX-512"
	@echo "make test-bits  the tests of what holds to the bit, on each"
	@echo "make mutants  bend the mathematics piece by piece; every time a test must fail (MUTANTS='rope skip': some)"
	@echo "make fuzz    ten minutes of fuzzing of what reads files"
	@echo "make check-all  all of that, other compilers, Pythons and processors (CHECKS='gcc mingw': some)"
	@echo "make sanitize  damaged files, and the tests of native code, under AddressSanitizer and UBSan (gcc, minutes)"
	@echo "make clean   remove the environment and everything built"

demo: $(PGOLF)
	$(BIN)/python -m pgolf.cli.demo

test: $(VENV)/.tested-with $(PGOLF)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# Each instruction set that this processor has; those that it lacks are named.
test-isa: $(VENV)/.tested-with $(PGOLF)
	@for isa in plain avx2 avx512; do \
	    if PGOLF_CPU_ISA=$$isa $(BIN)/python -c 'from pgolf import _C; _C.cpu_isa()' 2>/dev/null; then \
	        echo "PGOLF_CPU_ISA=$$isa"; PGOLF_CPU_ISA=$$isa $(BIN)/python -m pytest $(PYTEST_ARGS) || exit 1; \
	    else echo "PGOLF_CPU_ISA=$$isa: this processor has no such instructions; not run"; fi; \
	done

# What holds to the bit, on each instruction set.
test-bits:
	$(MAKE) test-isa PYTEST_ARGS="-q tests/test_products.py tests/test_bits.py tests/test_generate.py tests/test_ttt.py"

dev: $(VENV)/.tested-with $(VENV)/.dev

wheel: $(VENV)/.packed-with
	PGOLF_CUDA="$(WHEEL_CUDA)" PGOLF_CUDA_ARCHITECTURES="$(WHEEL_ARCHITECTURES)" PGOLF_WERROR=$(PGOLF_WERROR) $(BIN)/python dev/wheel.py

test-wheel: $(VENV)/.tested-with
	$(BIN)/python dev/try_wheel.py $(WHEEL) --tests $(WHEEL_TESTS)

lint: $(VENV)/.tested-with $(PGOLF)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest --allowlist dev/stubtest_allowlist.txt pgolf._C

sanitize: $(VENV)/.tested-with
	PATH="$(abspath $(BIN)):$$PATH" && CXX="$(SANITIZE_CXX)" cmake -S . -B $(SANITIZE) -G Ninja -DPGOLF_SANITIZE=ON -DPGOLF_CUDA=off \
	    -DPython_EXECUTABLE="$(abspath $(BIN)/python)" \
	    -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)" && cmake --build $(SANITIZE)
	rm -rf $(SANITIZE)/site && mkdir $(SANITIZE)/site
	cp -R python/pgolf $(SANITIZE)/site/ && cp $(SANITIZE)/_C.*.so $(SANITIZE)/site/pgolf/
	@# An editable install puts a finder before PYTHONPATH, which would import another build.
	echo 'import sys; sys.meta_path[:] = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]' \
	    > $(SANITIZE)/site/sitecustomize.py
	$(SANITIZED) -c 'import pgolf._C as c; assert "$(SANITIZE)/site" in c.__file__, c.__file__'
	$(SANITIZED) dev/corrupt.py
	$(SANITIZED) -m pytest tests/test_ops.py tests/test_quantize.py tests/test_core.py $(PYTEST_ARGS)

fuzz: $(VENV)/.fuzzed-with $(PGOLF)
	$(BIN)/python dev/fuzz_containers.py --minutes $(FUZZ_MINUTES)

mutants: $(VENV)/.tested-with $(PGOLF)
	PGOLF_CUDA=off $(BIN)/python dev/mutants.py $(MUTANTS)

check-all: $(VENV)/.tested-with $(PGOLF)
	PGOLF_CUDA=off $(BIN)/python dev/check_all.py $(CHECKS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.tools: requirements/build.txt dev/find_python.sh
	@python=$$(sh dev/find_python.sh "$(PYTHON)") && \
	{ $(BIN)/python -m pip --version >/dev/null 2>&1 || "$$python" -m venv $(VENV); }
	$(PIP) -r requirements/build.txt
	@touch $@

$(VENV)/.tested-with: requirements/test.txt $(VENV)/.tools
	$(PIP) -r requirements/test.txt
	@touch $@

$(VENV)/.packed-with: requirements/wheel.txt $(VENV)/.tools
	$(PIP) -r requirements/wheel.txt
	@touch $@

$(VENV)/.fuzzed-with: requirements/fuzz.txt $(VENV)/.tested-with
	$(PIP) -r requirements/fuzz.txt
	@touch $@

# What was asked for last: another answer builds anew.
$(VENV)/.cuda-$(PGOLF_CUDA): $(VENV)/.tools
	@rm -f $(VENV)/.cuda-* && touch $@

$(VENV)/.installed: $(VENV)/.tools $(VENV)/.cuda-$(PGOLF_CUDA) $(NATIVE) $(PACKAGE)
	$(INSTALL) ".[plot]"
	@touch $@

$(VENV)/.dev: $(VENV)/.tools $(VENV)/.cuda-$(PGOLF_CUDA) $(NATIVE)
	$(INSTALL) --editable ".[plot]"
	@touch $@
