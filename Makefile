# One stamp stands for "the environment is complete"; whatever runs Python depends on it.

PYTHON ?= python3
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := .venv/bin
READY := .venv/.ready
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: demo test test-all notebooks lint clean
.DELETE_ON_ERROR:

demo: $(READY)
	$(BIN)/curvlab run

# One process for each core, and one thread in each: small models gain nothing from more.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto

test: $(READY)
	$(PYTEST) -m "not slow"

test-all: $(READY)
	$(PYTEST)

# The .py files are the notebooks' sources; the .ipynb beside them are the same with outputs.
notebooks: $(READY)
	$(BIN)/python notebooks/execute.py

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/mypy curvlab

# Everything that this Makefile and the tools leave behind; results in runs/ stay.
clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Linux wheels of torch on the normal index bring gigabytes of CUDA. Without an NVIDIA driver the CPU build is
# tried first, once; --no-deps leaves all other packages to the pinned installation that follows. Where pip has
# wheels of its own (find-links), those are meant to be used.
$(READY): setup.cfg constraints.txt
	$(PYTHON) -m venv .venv
	@if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1 \
	    && ! $(BIN)/pip config list | grep -q find-links; then \
	    echo "no NVIDIA driver: fetching the CPU build of $(TORCH)"; \
	    $(BIN)/pip install -q --retries 0 --no-deps --index-url $(TORCH_CPU_INDEX) '$(TORCH)' >/dev/null 2>&1 || true; \
	fi
	$(BIN)/pip install -q -c constraints.txt -e '.[test]'
	@touch $@
