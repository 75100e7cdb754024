# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
PROMPT ?= a large red star above a blue ring on a white background

.PHONY: demo test lint package clean

demo: $(VENV)/.base
	$(BIN)/diffusion-attn generate "$(PROMPT)" --method hidiffusion --hidiffusion.window_attention false --size 128 --num-images 3 --compare --output outputs/demo

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

package: $(VENV)/.dev
	$(BIN)/python .ci/package.py --oldest

$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(PIP) --editable ".[test]"
	touch $@

$(VENV)/.dev: $(VENV)/.test
	$(PIP) --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
