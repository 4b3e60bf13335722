# headrace: one target per thing a person does. `make help` prints this page's own comments.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.headrace-ready
DOCS_VENV := .venv-docs
HEADRACE := $(BIN)/headrace

# What a person typed is text: neither make nor the shell reads $, `, quotes or braces in it. $(value ...) takes it
# unexpanded, `override` keeps make from expanding it when it exports the variables of its own command line, and a
# recipe finds it in the environment. The program splits conf and overrides itself.
TYPED := conf overrides prompt run runs out hf resume name dry json profile
$(foreach word,$(TYPED),$(eval override $(word) := $$(value $(word))))
$(foreach word,$(TYPED),$(eval export HEADRACE_$(shell echo $(word) | tr a-z A-Z) := $$(value $(word))))

.PHONY: help setup train sweep plan verify eval doctor bench dashboard monitor mlflow report compare generate export
.PHONY: test test-gpu soak bench-gpu check fmt lint types docs clean

help: ## print this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(STAMP) ## make .venv from the lock file (a second call has nothing to do)

$(STAMP): requirements.lock requirements-gds.lock requirements-triton.lock pyproject.toml scripts/setup.sh
	@PYTHON="$(PYTHON)" bash scripts/setup.sh $(VENV)
	@touch $(STAMP)

train: setup ## train: conf=experiment/NAME or my.yaml, overrides="train.steps=50 memory=keep" resume=RUN dry=1
	@$(HEADRACE) train $${HEADRACE_RESUME:+--resume "$$HEADRACE_RESUME"} $${HEADRACE_DRY:+--dry-run}

sweep: setup ## train a grid of runs and compare them: conf=... overrides="memory=keep,recompute optim.lr=1e-3,1e-4"
	@$(HEADRACE) sweep $${HEADRACE_JSON:+--json}

plan: setup ## print whether a run fits, its step time and the memory of each tier (no GPU, no Ray)
	@$(HEADRACE) plan

verify: setup ## compare loss and gradients with transformers on a Hugging Face folder: hf=DIR overrides="dtype=bf16"
	@$(HEADRACE) verify $${HEADRACE_HF:+hf="$$HEADRACE_HF"} $${HEADRACE_JSON:+--json}

eval: setup ## loss and perplexity by position of a run's model: run=DIR (or hf=DIR) overrides="data.seq_len=65536 memory=chunk_host"
	@$(HEADRACE) eval $${HEADRACE_RUN:+run="$$HEADRACE_RUN"} $${HEADRACE_HF:+hf="$$HEADRACE_HF"} $${HEADRACE_OUT:+out="$$HEADRACE_OUT"} \
		$${HEADRACE_JSON:+--json}

doctor: setup ## check this machine: what is wrong, and the remedy (profile=1 measures it)
	@$(HEADRACE) doctor $${HEADRACE_PROFILE:+--profile} $${HEADRACE_OUT:+out="$$HEADRACE_OUT"} $${HEADRACE_JSON:+--json}

bench: setup ## run one benchmark: name=NAME; rows are written to bench_results/, or to out=DIR
	@$(HEADRACE) bench $${HEADRACE_NAME:+"$$HEADRACE_NAME"} $${HEADRACE_OUT:+out="$$HEADRACE_OUT"}

dashboard: setup ## start a local Ray head that keeps running; runs join it
	@$(HEADRACE) dashboard

monitor: setup ## start Prometheus with our alerts, Grafana where it is installed, and a page of the newest run
	@$(HEADRACE) monitor

mlflow: setup ## open the MLflow UI on the runs recorded here
	@$(HEADRACE) mlflow

report: setup ## write and show report.html of a run: run=DIR
	@$(HEADRACE) report $${HEADRACE_RUN:+run="$$HEADRACE_RUN"}

compare: setup ## put runs side by side on one page: runs="RUN RUN ..." out=FILE.html
	@$(HEADRACE) compare $${HEADRACE_OUT:+out="$$HEADRACE_OUT"} $${HEADRACE_JSON:+--json}

generate: setup ## continue text with a trained model: run=DIR prompt="..."
	@$(HEADRACE) generate $${HEADRACE_RUN:+run="$$HEADRACE_RUN"} $${HEADRACE_PROMPT:+--prompt "$$HEADRACE_PROMPT"}

export: setup ## write a trained model as a Hugging Face folder: run=DIR out=DIR
	@$(HEADRACE) export $${HEADRACE_RUN:+run="$$HEADRACE_RUN"} $${HEADRACE_OUT:+out="$$HEADRACE_OUT"}

# One test process more than there are cores, for many tests wait: for Ray, a disk, a time limit. What tests start finds
# its modules compiled.
test: setup ## the whole test suite, CPU only (some 15 minutes on 2 cores)
	@n=$$(nproc); PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -m "not soak and not gpu" -q -n $$((n < 4 ? n + 1 : 4)) \
		--dist loadfile --no-loadscope-reorder

test-gpu: setup ## the tests that need a CUDA device
	@$(BIN)/pytest -m "gpu and not soak" -q tests

soak: setup ## the long tests
	@$(BIN)/pytest -m "soak" -q --timeout=3600

bench-gpu: setup ## the main benchmark; needs a CUDA device; rows are written to bench_results/, or to out=DIR
	@$(HEADRACE) bench gpu-headline $${HEADRACE_OUT:+out="$$HEADRACE_OUT"}

check: setup lint types ## format, lint, types, architecture
	@$(BIN)/pytest -q tests/architecture

fmt: setup ## format the code
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

lint: setup
	@$(BIN)/ruff format --check . && $(BIN)/ruff check .

types: setup
	@$(BIN)/mypy headrace

# A virtual environment of its own: what builds pages is no part of a training machine's.
$(DOCS_VENV)/.ready: docs/requirements.lock
	@$(PYTHON) -m venv $(DOCS_VENV) && $(DOCS_VENV)/bin/python -m pip install -q --disable-pip-version-check -r docs/requirements.lock
	@touch $@

docs: $(DOCS_VENV)/.ready ## build the documentation site into build/site (open build/site/index.html)
	@NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict --quiet -f docs/mkdocs.yml

clean: ## remove the virtual environment and caches (runs are kept)
	@rm -rf $(VENV) $(DOCS_VENV) .mypy_cache .pytest_cache .ruff_cache
