# The commands of this project. Python 3.11 or newer, make and git are all they need; the benchmark also needs gcc.
# Each target builds or refreshes .venv first, which takes no time when nothing has changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
WORKERS ?= 3

# nothing that runs here reports to anybody
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT := false
export DO_NOT_TRACK := 1
export GX_ANALYTICS_ENABLED := false
export UV_PYTHON_DOWNLOADS := never
# the stock 20 s are too few for the first start on a busy machine
export PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS := 120

.DEFAULT_GOAL := help
.PHONY: help quickstart install test test-all check format bench bench-stores docs docs-serve server worker deploy lock clean

help: ## show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: env-quickstart env-all env-test
env-quickstart env-all env-test: env-%:
	@command -v $(PYTHON) >/dev/null || { echo "No $(PYTHON) on PATH: MarketSync needs Python 3.11 or newer (make PYTHON=/path/to/python3)." >&2; exit 1; }
	@$(PYTHON) scripts/environment.py --venv $(VENV) $*

quickstart: env-quickstart ## fetch, store, break and repair a small market on this machine
	$(BIN)/marketsync quickstart $(ARGS)

install: env-all ## the application with every engine and Prefect, in .venv

test: env-test ## the everyday tests (ARGS="-k words" chooses)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m "not slow" $(ARGS)

test-all: env-test ## every test, the slow ones too
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(ARGS)

CHECKS := check-style check-types check-layers check-tree check-docs
check: env-test ## style, types, layers, documentation, and what must not be in the tree
	@$(MAKE) --no-print-directory --keep-going $(CHECKS)

.PHONY: $(CHECKS)
check-style:
	$(BIN)/ruff check
	$(BIN)/ruff format --check
check-types:
	$(BIN)/pyright
check-layers:
	$(BIN)/lint-imports
check-tree:
	$(BIN)/python scripts/check_tree.py
check-docs:
	$(BIN)/zensical build --strict

format: env-test ## put imports and layout in order
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: env-test ## measure beside dlt and a plain loop (BENCH=w1,w3 chooses, QUICK=1 is smaller)
	$(BIN)/python -m benchmarks.run $(if $(BENCH),--only $(BENCH)) $(if $(QUICK),--quick) $(ARGS)

bench-stores: env-test ## measure the stores beside each engine's bulk path and others (ENGINES=postgresql,mysql, QUICK=1)
	$(BIN)/python -m benchmarks.stores $(if $(ENGINES),--only $(ENGINES)) $(if $(QUICK),--quick) $(ARGS)

docs: env-test ## build the documentation into site/
	$(BIN)/zensical build --strict

docs-serve: env-test ## read the documentation at http://127.0.0.1:8000
	$(BIN)/zensical serve

# where the server of these targets is; PREFECT_PORT=4300 puts it elsewhere, PREFECT_API_URL names another machine's
PREFECT_PORT ?= 4200
server worker deploy: export PREFECT_HOME ?= $(CURDIR)/.marketsync/prefect
# the newer pages ask a service of Prefect's analytics for its settings even where analytics are off; the older do not
server: export PREFECT_SERVER_UI_V2_ENABLED ?= false
server: export PREFECT_SERVER_UI_API_URL ?= http://127.0.0.1:$(PREFECT_PORT)/api
server: env-all ## a Prefect server at http://127.0.0.1:4200 (PREFECT_PORT=4300 elsewhere)
	@mkdir -p $(PREFECT_HOME)
	$(BIN)/prefect --no-prompt server start --host 127.0.0.1 --port $(PREFECT_PORT)

worker deploy: export MARKETSYNC_HOME ?= $(CURDIR)
worker deploy: export PREFECT_API_URL ?= http://127.0.0.1:$(PREFECT_PORT)/api
worker: env-all ## a Prefect worker for the pool marketsync of that server
	@mkdir -p $(PREFECT_HOME)
	$(BIN)/prefect --no-prompt worker start --pool marketsync --type process

deploy: env-all ## put the deployments of prefect.yaml on that server
	@mkdir -p $(PREFECT_HOME)
	scripts/deploy.sh

# an environment that is there stays as it is: it would be brought to the old locks, only to have the new ones next
$(BIN)/uv:
	@$(MAKE) --no-print-directory env-quickstart
lock: | $(BIN)/uv ## resolve requirements/*.txt again (UPGRADE=1 takes newer versions)
	UPGRADE=$(UPGRADE) scripts/lock.sh

clean: ## remove what the targets made, .venv too
	rm -rf $(VENV) .venvs build site *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache .cache benchmarks/out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
