# make setup | demo | test | check | bench | format
# PYTHON names the interpreter that makes .venv (3.10 or newer); VENV puts the environment elsewhere.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

MODEL ?= model_configs/bundled/h2o-stories-q8_0.gguf
PROMPT ?= Once upon a time

BENCH_SHAPE ?= qwen2.5-0.5b
BENCH_BUDGETS ?= 400 700 1400
BENCH_TOKENS ?= 16
BENCH_MODEL := bench-results/$(BENCH_SHAPE).gguf

.PHONY: setup demo test check bench format

setup: $(STAMP)

# Installs again only when pyproject.toml changed. An environment that is already there is kept.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "h2o needs Python 3.10 or newer: make PYTHON=python3.x")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV); the first time this compiles llama.cpp, which takes some minutes"
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

# Profile, plan and run of the bundled model in the smallest budget for a context of 512: its weights are streamed.
demo: setup
	@budget=$$($(BIN)/h2o inspect $(MODEL) --json | $(BIN)/python -c \
	  'import json, sys; print(json.load(sys.stdin)["floor_bytes"] // 10**6)') && \
	show() { printf '\n$$ h2o'; for a; do case $$a in *' '*) a="\"$$a\"";; esac; printf ' %s' "$$a"; done; echo; \
	  $(BIN)/h2o "$$@"; } && \
	show profile $(MODEL) && \
	show plan $(MODEL) -m $$budget && \
	show run $(MODEL) -m $$budget -p "$(PROMPT)" -n 60 --ctx 512 --temp 0

test: setup
	$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_imports.py

# A model with random weights, profiled, then run in several budgets (MB): one JSON row each.
bench: setup $(BENCH_MODEL)
	$(BIN)/h2o profile $(BENCH_MODEL)
	@for budget in $(BENCH_BUDGETS); do \
	  $(BIN)/h2o run $(BENCH_MODEL) -m $$budget -p "$(PROMPT)" -n $(BENCH_TOKENS) --temp 0 --json || exit 1; \
	done

$(BENCH_MODEL): | $(STAMP)
	@mkdir -p $(@D)
	$(BIN)/h2o bench make-model $(BENCH_SHAPE) -o $@

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
