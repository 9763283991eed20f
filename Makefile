# Each target makes the virtual environment and everything in it, and reuses what is there.
#   PYTHON=python3.12   the interpreter to make the environment with
#   VENV=.venv-3.12     where the environment lies
#   PGOLF_WERROR=ON     compiler warnings are errors
#   PYTEST_ARGS="-k x"  passed on to pytest

VENV ?= .venv
PYTHON ?=
PGOLF_WERROR ?= OFF
PYTEST_ARGS ?=

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

.PHONY: help demo test dev lint clean
.NOTPARALLEL:  # one pip at a time

help:
	@echo "make demo    train, squeeze and score a small model on this machine's own documentation (minutes)"
	@echo "make test    run all tests"
	@echo "make dev     install for development: Python changes apply at once, C++ changes after make dev"
	@echo "make lint    check style, types and stubs"
	@echo "make clean   remove the environment and everything built"

demo: $(PGOLF)
	$(BIN)/python -m pgolf.demo

test: $(VENV)/.tested-with $(PGOLF)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

dev: $(VENV)/.tested-with $(VENV)/.dev

lint: $(VENV)/.tested-with $(PGOLF)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc -name '*.h' -o -name '*.cpp' | xargs $(BIN)/clang-format --dry-run -Werror
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest --allowlist dev/stubtest_allowlist.txt pgolf._C

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

$(VENV)/.installed: $(VENV)/.tools $(NATIVE) $(PACKAGE)
	$(INSTALL) ".[plot]"
	@touch $@

$(VENV)/.dev: $(VENV)/.tools $(NATIVE)
	$(INSTALL) --editable ".[plot]"
	@touch $@
