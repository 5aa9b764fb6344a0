# Everything works on a fresh machine with Python 3.10 or newer: each target sets up .venv first if that is not done.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Our shells and tools find the environment's programs first, and never a module path meant for another project.
export PATH := $(CURDIR)/$(BIN):$(PATH)
unexport PYTHONPATH PYTHONHOME
# Tests start hundreds of processes, each of which would compile our modules anew.
unexport PYTHONDONTWRITEBYTECODE
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## Say what there is
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 20

.PHONY: setup
setup: $(STAMP) ## Make .venv and install penstock with everything to serve, test and check it

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
		echo "penstock needs Python 3.10 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | tail -n 1)." >&2; \
		echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@# An environment that was moved, or whose Python is gone, cannot be repaired: start over.
	@[ -x $(BIN)/python ] && $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { \
		echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "installing penstock into $(VENV) …"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[serve,files,dev,docs]'
	@touch $@

# Most tests wait rather than compute, so four processes share the cores.
SIDE_BY_SIDE := --numprocesses=4 --dist=loadscope
# Two Rays at once are enough for two cores, so those of the containers run beside tests that start none.
BESIDE_CONTAINERS := tests/containers tests/proxy tests/workers

.PHONY: test
test: $(STAMP) ## Run all tests, on an embedded broker and on those in containers if a Docker engine answers
ifdef ARGS
	@$(BIN)/python -m pytest $(ARGS)
else
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not alone" $(BESIDE_CONTAINERS:%=--ignore=%)
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) $(BESIDE_CONTAINERS)
	@$(BIN)/python -m pytest -m alone tests/faults
endif

.PHONY: check
check: $(STAMP) ## Check format, rules and types, and run the quick tests: within a minute on two cores
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target check-code check-units

.PHONY: check-code
check-code:
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/mypy

.PHONY: check-units
check-units:
	@$(BIN)/python -m pytest --quiet -r fE --numprocesses=2 -m "not slow" --hypothesis-profile=quick \
		--ignore=tests/faults --ignore=tests/security

.PHONY: faults
faults: $(STAMP) ## Kill processes, cut connections and send garbage for most of an hour; print one table
	@PENSTOCK_TEST_FAULTS=full $(BIN)/python -m pytest tests/faults tests/containers --timeout 1200 $(ARGS)

.PHONY: changes
changes: $(STAMP) ## Make every change under load, and print how many requests were sent and answered
	@$(BIN)/python -m pytest tests/serve/changing/test_steady_load.py --quiet --capture=no $(ARGS) 2>/dev/null

.PHONY: lint
lint: $(STAMP) ## Check format, rules and types
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/mypy
	@$(BIN)/pyright

.PHONY: format
format: $(STAMP) ## Format, and mend what ruff can mend
	@$(BIN)/ruff check --fix --quiet
	@$(BIN)/ruff format --quiet

.PHONY: docs
docs: $(STAMP) ## Build the pages of docs/ and the API reference into build/docs; a broken link fails
	@$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --fresh-env docs build/docs
	@echo "build/docs/index.html"

.PHONY: demo
demo: $(STAMP) ## Serve a trained model and call it over HTTP and through both kinds of handle
	@$(BIN)/python examples/digits.py

.PHONY: bench
bench: $(STAMP) ## Measure, side by side with others (needs wrk)
	@$(BIN)/python benchmarks/run.py $(ARGS)

.PHONY: dist
dist: $(STAMP) ## Build wheel and sdist, check both, and run the README's example from each in an environment of its own
	@rm -rf build/lib build/bdist.* build/clean dist
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt uv build twine
	@$(BIN)/python -m build --installer uv --outdir dist . >/dev/null
	@$(BIN)/python -m twine check --strict dist/*
	@for packed in dist/*.whl dist/*.tar.gz; do \
		rm -rf build/clean; echo "the README's example from $$packed" && $(BIN)/uv venv --quiet build/clean && \
		$(BIN)/uv pip install --quiet --python build/clean/bin/python --constraint constraints.txt \
			"penstock[serve] @ file://$(CURDIR)/$$packed" httpx && \
		(cd build && clean/bin/python ../tests/readme_example.py) || exit 1; \
	done
	@rm -rf build/clean

# What touches the libraries whose range is wide. None of it starts a Ray.
OLDEST := tests/testing/test_local.py tests/workers/test_runtime_env.py tests/serve/test_config.py tests/proxy/test_app.py

.PHONY: test-oldest
test-oldest: $(STAMP) ## Run a short set of tests with the oldest versions that pyproject.toml allows
	@$(BIN)/python -m pip install --quiet uv
	@$(BIN)/uv venv --quiet --allow-existing --python $(BIN)/python build/oldest
	@$(BIN)/uv pip install --quiet --python build/oldest/bin/python --resolution lowest-direct --editable '.[serve]' \
		'pytest==9.2.0' 'pytest-asyncio==1.5.0' 'pytest-timeout==2.4.0' 'pytest-xdist==3.8.0' \
		'hypothesis==6.168.5' 'httpx==0.28.1' 'numpy==2.2.6' 'testcontainers==4.15.0'
	@build/oldest/bin/python -m pytest --quiet -W default $(OLDEST)

.PHONY: constraints
constraints: $(STAMP) ## Pin the newest versions that pyproject.toml allows
	@$(BIN)/python -m pip install --quiet uv
	@{ sed -n '/^#/p' constraints.txt; $(BIN)/uv pip compile --quiet --universal --upgrade --python-version 3.10 \
		--no-header --no-annotate --extra serve --extra files --extra traces --extra dev --extra docs pyproject.toml; } > constraints.new
	@mv constraints.new constraints.txt

.PHONY: clean
clean: ## Remove .venv and what the tools have left
	@rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
