# make setup     everything that is needed, into .venv; quick the second time, and then without network
# make demo      see the embedded model at work on real pictures
# make test      the tests, two files at once (make test AT_ONCE=4); make test-all adds the slow proofs, one by one
# make lint      style, types, structure, spelling
# make bench     measure the embedded model on the open set (about half an hour on two cores)
# make docs      write what is made from the code: the reference of commands

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
AT_ONCE ?= 2

.PHONY: setup demo test test-all lint bench docs clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one: make setup PYTHON=python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[serve,train,data,finetune,dev]'
	touch $@

demo: setup
	$(BIN)/blip2 demo --out demo-output

test: setup
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n $(AT_ONCE) --dist loadfile

test-all: setup
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[serve,train,data,finetune,dev,clients]'
	$(BIN)/python -m pytest -m "slow or not slow"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/codespell $(wildcard *.md docs src tests)
	$(BIN)/pyright --pythonpath $(BIN)/python src

bench: setup
	$(BIN)/blip2 evaluate --model mini --out build/bench

docs: setup
	mkdir -p docs/reference
	$(BIN)/python -m typer blip2.cli.main utils docs --name blip2 --title "Commands" --output docs/reference/commands.md

clean:
	rm -rf demo-output .pytest_cache .ruff_cache build dist
