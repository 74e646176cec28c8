# Everything is set up from a fresh clone with nothing but python3 (3.11 or newer) and a network that pip can use.

PYTHON ?= python3
OUT    ?= runs/first

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv run test lint format docs train-vlm train-video-vlm train-vla train-video clean

help: ## print the targets
	@echo "make <target>, where <target> is one of"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile

venv: $(STAMP) ## create .venv with mmeff and its tools, once (about 6 GB)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "mmeff needs Python 3.11 or newer, and \`$(PYTHON)\` is: $$($(PYTHON) --version 2>&1)" >&2; \
	  echo "Install one, or name it: make $(firstword $(MAKECMDGOALS)) PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "\`$(PYTHON) -m venv\` failed; on Debian and Ubuntu install the package python3-venv" >&2; exit 1; }
	@echo "Installing mmeff and everything it needs into $(VENV): about 6 GB, a few minutes, only this once"
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --no-input -c constraints.txt -e ".[dev]"
	@touch $@

run: $(STAMP) ## compare dense with accelerated models on the tiny models, into runs/first (OUT=...)
	@$(BIN)/mmeff compare --out $(OUT) --overwrite --overwrite
	@echo "The results are in $(OUT)/: open $(OUT)/report.html"

.PHONY: demo
demo: $(STAMP) ## open the demo on http://127.0.0.1:7860 (ARGS="--model ... --port ..."; mmeff demo --help)
	@$(BIN)/mmeff demo $(ARGS)

# Tests run in one process per core, at most four: a file at a time, so that what a file loads is loaded once, in their order, as
# the files with few tests are the long ones, which no process should be left alone with at the end. The Triton
# kernels run in Triton's interpreter, which is a mode of a whole process, and therefore by themselves.
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest
JOBS   := -n auto --maxprocesses 4
FILES  := --dist loadfile --no-loadscope-reorder

test: $(STAMP) ## run the tests (ARGS="-k layout" for some of them)
ifdef ARGS
	@$(PYTEST) $(ARGS)
else
	@failed=0; $(PYTEST) $(JOBS) $(FILES) || failed=1; \
	echo; echo "The Triton kernels, in Triton's interpreter:"; \
	TRITON_INTERPRET=1 $(PYTEST) $(JOBS) --dist worksteal -q -m interpreter -p no:cacheprovider tests/kernels || failed=1; exit $$failed
endif

lint: $(STAMP) ## check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## format the code and sort its imports
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

docs: $(STAMP) ## write the tables of methods and of committed measurements into README.md and docs/
	$(BIN)/python docs/make_tables.py
	$(BIN)/python docs/make_results.py
	$(BIN)/python docs/make_backbones.py
	$(BIN)/python docs/make_performance.py

train-vlm: $(STAMP) ## train the tiny vision-language model, resumable, into runs/tiny-vlm
	$(BIN)/mmeff train tiny-vlm

train-video-vlm: $(STAMP) ## train the tiny vision-language model of clips, resumable, into runs/tiny-video-vlm
	$(BIN)/mmeff train tiny-video-vlm

train-vla: $(STAMP) ## train the tiny policy of the manipulation task, resumable, into runs/tiny-vla
	$(BIN)/mmeff train tiny-vla

train-video: $(STAMP) ## train the tiny video model, resumable, into runs/tiny-video
	$(BIN)/mmeff train tiny-video

.PHONY: train-image
train-image: $(STAMP) ## train the tiny image model, resumable, into runs/tiny-image
	$(BIN)/mmeff train tiny-image

clean: ## remove .venv, caches and built packages; runs/ and data/ stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find mmeff tests docs -name __pycache__ -type d -prune -exec rm -rf {} +
