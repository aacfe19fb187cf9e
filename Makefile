.DEFAULT_GOAL := help
.PHONY: help setup demo test test-browser test-engines lint check docs bench up down lock clean

RUN := .venv/bin
KAFKA_PORT ?= 9092
REDIS_PORT ?= 6379
export KAFKA_PORT REDIS_PORT

help: ## Show this help.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.installed ## Make .venv from the hashed lock (TORCH_BACKEND=cpu for CPU-only torch).

.venv/.installed: requirements.txt pyproject.toml infra/setup.sh
	@infra/setup.sh

demo: setup ## Run the whole path on one machine and write a report (DATASET=file.toml for your own data).
	@$(RUN)/tessera demo $(if $(DATASET),--dataset $(DATASET) --out out/demo-$(notdir $(basename $(DATASET)))) $(if $(SMALL),--small --out out/demo-small)

test: setup ## Run the tests; Kafka and Redis servers join in after `make up`.
	@infra/test.sh

test-browser: setup ## Look at the console in a real Chromium (Debian's chromium; npm fetches axe-core once).
	@infra/browser.sh

test-engines: setup ## Run batch jobs on real Flink and Spark clusters, Dask and Prism (needs Java 17, Maven and Go).
	@infra/test-engines.sh

lint: setup ## Ruff and mypy.
	@$(RUN)/ruff check . && $(RUN)/ruff format --check . && $(RUN)/mypy

check: lint test ## Lint and tests; CI runs test-browser too.

docs: setup ## Build the docs site into out/site.
	@NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --strict && echo "docs: out/site/index.html"

bench: setup ## Quality beside the baselines in three seeds (DATASET=file.toml).
	@$(RUN)/tessera bench main-job --seeds 3 $(if $(DATASET),--dataset $(DATASET))

up: setup ## Start a real Kafka broker and a Redis server on this machine, without Docker.
	@infra/kafka/kafka.sh start && infra/redis.sh start

down: ## Stop what `make up` started.
	@infra/kafka/kafka.sh stop; infra/redis.sh stop

lock: ## Compile the locks again from pyproject.toml: of all, of a GPU machine, of the image.
	@uv pip compile pyproject.toml --extra all --extra dev --quiet --generate-hashes --no-emit-index-url --no-header \
	  --python-version 3.11 --python-platform x86_64-unknown-linux-gnu -o requirements.txt
	@uv pip compile pyproject.toml --no-config --extra cuda --extra serve --extra dev --constraint requirements.txt --quiet \
	  --generate-hashes --no-emit-index-url --no-header --no-annotate \
	  --python-version 3.11 --python-platform x86_64-unknown-linux-gnu -o requirements-cuda.txt
	@uv pip compile pyproject.toml --extra all --extra objects --extra traces --constraint requirements.txt --quiet \
	  --generate-hashes --no-emit-index-url --no-header --no-annotate \
	  --python-version 3.11 --python-platform x86_64-unknown-linux-gnu -o requirements-image.txt

clean: ## Remove what was built and run; keeps .venv.
	@rm -rf out .tessera .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
