# Everything happens in .venv, which these targets make. TORCH names the torch of that environment only;
# the package itself asks for torch>=2.10.
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := CMakeLists.txt pyproject.toml $(shell find cmake csrc tests/hostcuda bench/native -type f)
# Builds in place, in one folder: what the demo compiled is not compiled again for the tests.
INSTALL = $(BIN)/pip install --quiet --no-build-isolation -Cbuild-dir=build/dev
# The CPU side alone.
DEMO_INSTALL = $(INSTALL) -Ccmake.define.FILBERT_CUDA=OFF --editable
# With what only the tests need. FILBERT_CUDA_ARCHS chooses the GPUs built for.
FILBERT_CUDA_ARCHS ?= 80-real;90
DEV_INSTALL = $(INSTALL) -Ccmake.define.FILBERT_CUDA=AUTO \
  -Ccmake.define.FILBERT_EMULATED_ISA=ON -Ccmake.define.FILBERT_HOSTCUDA=ON \
  -Ccmake.define.FILBERT_KEEP_REPORTS=ON -Ccmake.define.FILBERT_KERNEL_CHECK=ON \
  -Ccmake.define.FILBERT_BENCH=ON \
  "-Ccmake.define.FILBERT_CUDA_ARCHS=$(FILBERT_CUDA_ARCHS)" --editable

.PHONY: demo test test-avx512 bench gpu-check check-torch-headers lint build clean

demo: $(VENV)/.demo
	$(BIN)/python -m filbert.app.demo

# Tests run in as many processes as there are processors; WORKERS=0 runs them in one.
WORKERS ?= auto
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses=8 --dist=worksteal

test: $(VENV)/.built build/transformers4 build/torch-2.10.0
	$(PYTEST)
	PYTHONPATH=build/transformers4 $(PYTEST) tests/nn/test_encoder.py $(addprefix tests/conversion/test_,\
	  convert.py swap.py capture.py cuda_model.py masked_rows.py)

# Every copy of the CPU kernels without torch: natively, and in an emulated machine those with AVX-512
# that this processor lacks. ARGS=--emulate emulates what it has too; see docs/avx512.md.
test-avx512: $(VENV)/.built
	$(BIN)/cmake --build build/dev --target kernel_check kernel_check_planted
	$(BIN)/python tests/avx512/run.py build/dev/tests/avx512 $(ARGS)

# The other line of transformers that filbert supports, beside the environment's own. It is kept
# apart from torch's and filbert's dependencies; requests is the one that only it has.
build/transformers4: | $(VENV)/.built
	$(BIN)/pip install --quiet requests
	$(BIN)/pip install --quiet --no-deps --target $@ "transformers==4.57.*" "tokenizers<0.23" "huggingface-hub<1.0"

# The headers of the oldest torch that is promised: a wheel of 80 MB, of which 40 MB are kept.
build/torch-2.10.0: | $(VENV)/.torch
	$(BIN)/python cmake/torch_headers.py 2.10.0

# The bindings against other torches, without installing one: the oldest, and those of GPU machines.
HEADERS ?= 2.10.0 2.11.0 2.12.1
check-torch-headers: $(VENV)/.torch
	$(BIN)/python cmake/torch_headers.py $(HEADERS)

# Every case with its default budget, on an otherwise idle machine; see python -m bench run --help.
bench: $(VENV)/.bench
	$(BIN)/python -m bench run all --json bench/results

# On a machine with an NVIDIA GPU, with that machine's own python and CUDA PyTorch: no .venv, no
# network. OUT or --out says where the report goes; FILBERT_LIBRARY_DIR names libraries built
# elsewhere. ARGS="--only bench --resume" does a part of it, and nothing twice: docs/cuda/gpu_check.md.
gpu-check:
	PYTHONPATH=python$(if $(PYTHONPATH),:$(PYTHONPATH)) $(PYTHON) -m bench.gpu_check$(if $(ARGS), $(ARGS))

lint: $(VENV)/.built
	$(BIN)/pip install --quiet ruff mypy clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc tests/hostcuda tests/avx512 bench/native -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

build: $(VENV)/.built

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)" numpy "scikit-build-core>=0.10" "pybind11>=2.13" "cmake>=3.26" "ninja>=1.11"
	touch $@

$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	$(DEMO_INSTALL) ".[demo]"
	touch $@

# With nvcc the tests also look at the machine code, with the disassembler from PyPI.
$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	$(DEV_INSTALL) ".[test]"
	if command -v nvcc >/dev/null && ! command -v cuobjdump >/dev/null; then \
	  $(BIN)/pip install --quiet nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm || true; fi
	touch $@ $(VENV)/.demo

$(VENV)/.bench: $(VENV)/.built
	$(DEV_INSTALL) ".[bench]"
	touch $@

clean:
	rm -rf build $(VENV)
