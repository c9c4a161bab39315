# Everything runs in .venv, which the first command creates. Needs Python 3.11 or newer, pip and make.
PYTHON ?= python3
BIN := .venv/bin
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs

.PHONY: demo test mutants torture wrong check docs serve-docs bench format generate clean

demo: .venv/demo  ## train on handwritten digits over gRPC, with 4 worker processes
	$(BIN)/optserve demo

test: .venv/dev  ## the whole test suite, in two processes
	$(BIN)/pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder

mutants: .venv/dev  ## change every expression of the rules, one at a time: do the tests see it? takes ten minutes
	$(BIN)/python tests/mutants.py

torture: .venv/dev  ## kill a server 1000 times under load, drop 10000 acknowledgements, lose power, damage files: half an hour
	$(BIN)/python -m tests.torture.kills
	$(BIN)/python -m tests.torture.dropped_acks
	$(BIN)/python -m tests.torture.power_loss
	$(BIN)/python -m tests.torture.damage
	$(BIN)/python -m tests.torture.failpoints

wrong: .venv/dev  ## servers and workers that are wrong on purpose: do the checks see it?
	$(BIN)/python -m tests.torture.wrong
	$(BIN)/python -m tests.torture.wrong_storage

check: .venv/dev docs  ## lint, types, generated code, the documentation's site
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_project.py

docs: .venv/dev  ## the documentation's site, in site/; every warning is an error
	$(MKDOCS) build --quiet --strict

serve-docs: .venv/dev  ## the same on 127.0.0.1:8000, built anew when a file changes
	$(MKDOCS) serve

bench: .venv/bench  ## measure against the memory, the disk, torch, gRPC, Arrow Flight and Ray; slow links and crowds; takes over an hour and 16 GB
	$(BIN)/python -m benchmarks

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

generate: .venv/dev  ## client/optserve/v1 from proto/
	$(BIN)/python proto/generate.py

.venv/demo .venv/dev .venv/bench: .venv/%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[$*]'
	touch $@

clean:
	rm -rf .venv site
