# Everything a person or CI does here. VENV=path says where the environment is kept.
VENV ?= .venv
PY := $(VENV)/bin/python
# STREAMINFER_TORCH=cpu takes the small build of torch; see README.
STAMP := $(VENV)/.streaminfer

.DEFAULT_GOAL := help
.PHONY: help demo test check fix bench clean

help:  ## list what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

$(STAMP): pyproject.toml
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: python3 is $$(python3 -V)"; exit 1; }
	test -x $(PY) || python3 -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## stream real images through a cut model; SERVE=1 keeps it up
	@$(PY) stages/digits/demo.py $(if $(SERVE),--serve)

test: $(STAMP)  ## all tests, on a real Kafka where one can be had
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: $(STAMP)  ## format, lint, types, import directions
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo 2>/dev/null || $(VENV)/bin/lint-imports

fix: $(STAMP)  ## format, and mend what the linter can
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

bench: $(STAMP)  ## measure, into a table and build/bench.json; ONLY='name …' runs some
	@$(PY) -m tests.benchmarks $(ONLY)

clean:  ## remove what was built, but for the environment
	rm -rf build dist .streaminfer .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
