# Everything happens in .venv, which these targets make. TORCH names the torch of that environment only;
# the package itself asks for torch>=2.10.
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := CMakeLists.txt pyproject.toml $(shell find cmake csrc -type f)

.PHONY: demo test bench lint build clean

demo: $(VENV)/.built
	$(BIN)/python -m filbert.demo

test: $(VENV)/.built
	$(BIN)/python -m pytest

# A short run of every case; results go to bench/results. Longer: python -m bench run e2e --help
bench: $(VENV)/.built $(VENV)/.bench
	$(BIN)/python -m bench run all

lint: $(VENV)/.built
	$(BIN)/pip install --quiet ruff mypy clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc -name '*.cpp' -o -name '*.h')

build: $(VENV)/.built

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)" numpy "scikit-build-core>=0.10" "pybind11>=2.13" "cmake>=3.26" "ninja>=1.11"
	touch $@

$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation -Cbuild-dir=build/dev --editable ".[test]"
	touch $@

$(VENV)/.bench: $(VENV)/.built
	$(BIN)/pip install --quiet --no-build-isolation -Cbuild-dir=build/dev --editable ".[bench]"
	touch $@

clean:
	rm -rf build $(VENV)
