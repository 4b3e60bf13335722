# headrace: one target per thing a person does. `make help` prints this page's own comments.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.headrace-ready
HEADRACE := $(BIN)/headrace

# $(value ...) keeps $, {} and | in overrides out of make's and the shell's hands:
# the program splits the exported text itself.
export HEADRACE_CONF := $(value conf)
export HEADRACE_OVERRIDES := $(value overrides)

.PHONY: help setup train plan verify doctor bench dashboard mlflow report generate export
.PHONY: test test-gpu soak bench-gpu check fmt lint types clean

help: ## print this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(STAMP) ## make .venv from the lock (a second call starts at once)

$(STAMP): requirements.lock requirements-gds.lock requirements-triton.lock pyproject.toml scripts/setup.sh
	@PYTHON="$(PYTHON)" bash scripts/setup.sh $(VENV)
	@touch $(STAMP)

train: setup ## train: conf=experiment/NAME overrides="train.steps=50 memory=keep" resume=RUN dry=1
	@$(HEADRACE) train $(if $(resume),--resume $(resume)) $(if $(dry),--dry-run)

plan: setup ## will it fit, how fast, and why (no GPU, no Ray)
	@$(HEADRACE) plan

verify: setup ## prove on a Hugging Face folder that we compute what transformers does: hf=DIR overrides="dtype=bf16"
	@$(HEADRACE) verify $(if $(hf),hf="$(hf)") $(if $(json),--json)

doctor: setup ## what this machine can do, what is wrong, and the remedy (profile=1 measures it)
	@$(HEADRACE) doctor $(if $(profile),--profile) $(if $(out),out=$(out)) $(if $(json),--json)

bench: setup ## run one benchmark: name=NAME
	@$(HEADRACE) bench $(name)

dashboard: setup ## start a local Ray head that stays; runs join it
	@$(HEADRACE) dashboard

mlflow: setup ## open the MLflow UI on the runs recorded here
	@$(HEADRACE) mlflow

report: setup ## write and show report.html of a run: run=DIR
	@$(HEADRACE) report $(run)

generate: setup ## continue text with a trained model: run=DIR prompt="..."
	@$(HEADRACE) generate $(if $(run),run=$(run)) $(if $(prompt),--prompt "$(prompt)")

export: setup ## write a trained model as a Hugging Face folder: run=DIR out=DIR
	@$(HEADRACE) export $(if $(run),run=$(run)) $(if $(out),out=$(out))

test: setup ## the whole test suite, CPU only (6 to 9 minutes on 2 cores)
	@$(BIN)/pytest -m "not soak and not gpu" -q -n auto --maxprocesses=4 --dist loadfile --no-loadscope-reorder

test-gpu: setup ## the tests that need a CUDA device
	@$(BIN)/pytest -m "gpu and not soak" -q tests

soak: setup ## the long forms of the tests
	@$(BIN)/pytest -m "soak" -q --timeout=3600

bench-gpu: setup ## the headline GPU rows, written to tests/bench/results/
	@$(HEADRACE) bench gpu-headline

check: setup lint types ## format, lint, types, architecture
	@$(BIN)/pytest -q tests/architecture

fmt: setup ## format the code
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

lint: setup
	@$(BIN)/ruff format --check . && $(BIN)/ruff check .

types: setup
	@$(BIN)/mypy headrace

clean: ## remove the virtual environment and caches (runs stay)
	@rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
