# The interpreter for a new .venv; `make PYTHON=python3.13 serve` makes it anew with another one.
PYTHON ?= python3
# Used where it is found; without it, venv and pip do the same.
UV ?= $(shell command -v uv 2>/dev/null)

RUNTIME := .venv/.runtime
DEV := .venv/.dev
FLOORS := .venv-floors/.floors
LOCK = $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-header --no-annotate pyproject.toml $(UPGRADE)
COMPILE = $(LOCK) --group build

ifneq ($(UV),)
VENV = $(UV) venv --quiet --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" .venv
INSTALL = $(UV) pip install --quiet --compile-bytecode --python $(1)/bin/python
else
VENV = $(PYTHON) -m venv .venv
INSTALL = .venv/bin/python -m pip --python $(1)/bin/python install --quiet --disable-pip-version-check
endif

.DEFAULT_GOAL := help
.PHONY: help dist release floors install serve dev demo screenshots site tools hooks test rest days faults nightly types check bench shape format lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

install: $(RUNTIME) ## what `serve` needs, in .venv

serve: install ## run the service; HOST and PORT are passed on
	@exec .venv/bin/batch serve

dev: install ## the same, and start it anew when a file of tasks/ or service/ changes
	@exec .venv/bin/batch serve --reload

demo: install ## serve a made-up fortnight that ends in a bad night, in the folder .demo
	@exec .venv/bin/batch demo --folder .demo

screenshots: tools ## make the pictures of the pages in docs/ anew, with Chromium
	.venv/bin/python -m tests.pages.screenshots

site: tools ## the documents as a site, in the folder site; a link that leads nowhere ends it
	.venv/bin/python -m mkdocs build --strict --clean

tools: $(DEV) ## what the targets below need, in .venv

# Hundreds of processes are started: where none of them may keep its bytecode, each compiles all libraries anew.
# Tests run four at a time, for much of it waits.
TESTS = PYTHONDONTWRITEBYTECODE= .venv/bin/pytest -n 4 --dist loadfile --no-loadscope-reorder
test: tools ## the tests that prove each promise, about five minutes; ARGS are passed on
	MODEL_EXAMPLES=2 $(TESTS) -m "not rest and not types and not nightly and not days" $(ARGS)

rest: tools ## all other tests that CI runs each time; ARGS are passed on
	$(TESTS) -m "rest and not types and not nightly and not days" $(ARGS)
	.venv/bin/pytest tests/model/test_model.py -n 2

# Stories wait more than they work, so many are told at a time.
days: tools ## stories of trouble that lasts minutes, with default settings, about ten minutes; ARGS are passed on
	PYTHONDONTWRITEBYTECODE= .venv/bin/pytest -n 16 --dist worksteal -o faulthandler_timeout=1200 -m days tests/days $(ARGS)

# Left out is what no library changes: documents, the shape of the code, pages in a browser, plans of databases, random faults.
WITHOUT = docs faults model test_architecture.py test_words.py batch/test_plans.py pages/test_browser.py pages/test_structure.py
# Older libraries warn of what newer ones have changed, and leave it to the garbage collector to close a connection whose
# opening is cancelled.
OLD = -W ignore::DeprecationWarning -W ignore:unclosed:ResourceWarning -W "ignore:<connection opened:ResourceWarning"
floors: $(FLOORS) ## those of `test` that a library can break, with the lowest versions that pyproject.toml allows
	PYTHONDONTWRITEBYTECODE= .venv-floors/bin/pytest -n 4 --dist loadfile --no-loadscope-reorder \
		$(OLD) -m "not rest and not types and not nightly and not days" $(WITHOUT:%=--ignore=tests/%) $(ARGS)

faults: tools ## the fault suite's long form, half an hour; FAULT_COUNT and FAULT_SEED change its plan
	FAULT_COUNT=$${FAULT_COUNT:-300} FAULT_SEED=$${FAULT_SEED:-$$(date +%s)} .venv/bin/pytest -s tests/faults
	OUTAGE_SECONDS=30 .venv/bin/pytest tests/database/test_outages.py
	AWAY_SECONDS=600 .venv/bin/pytest -o faulthandler_timeout=1200 -m days tests/days/test_server_away.py
	WRITER_SECONDS=61 .venv/bin/pytest tests/database/test_long_writer.py

nightly: tools ## what takes too long for `test`, about an hour: an installation from nothing, older states, and many more random cases
	.venv/bin/pytest -m nightly
	CRON_CASES=20000 BACKUP_EXAMPLES=2000 CHUNK_EXAMPLES=200 MODEL_EXAMPLES=200 .venv/bin/pytest \
		tests/batch/test_schedule_zones.py tests/backup/test_verify.py tests/batch/test_chunk_keys.py tests/model
	FORGED=all .venv/bin/pytest tests/backup/test_forged.py
	TESTS_PRELOADED=0 .venv/bin/pytest tests/server/test_serve.py tests/cli/test_tasks.py tests/docs/test_pages.py tests/testing
	REPLICA_WORKERS=4 .venv/bin/pytest tests/server/test_replicas.py
	CHUNK_KILLS=100 .venv/bin/pytest -s tests/batch/test_chunk_processes.py tests/batch/test_chunk_faults.py -k "killed or cut"

types: tools ## the type checkers over what authors write
	.venv/bin/pytest -m types

check: tools types ## lint, formatting, types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy --strict batch_system service tasks examples

shape: tools ## how large the code is, how it is cut, and how much one slot passes through
	@.venv/bin/python tools/shape.py

bench: tools ## every bench/*.py in turn
	@set -e; for script in bench/*.py; do echo "== $$script"; .venv/bin/python "$$script"; done

format: tools ## let ruff put the code right
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

hooks: tools ## let git check lint, formatting and types before each commit
	.venv/bin/pre-commit install

lock: ## write the lock files; UPGRADE=--upgrade takes the newest
	@[ -n "$(UV)" ] || { echo "make lock needs uv: install it, or give its place (make lock UV=path/to/uv)." >&2; exit 1; }
	$(COMPILE) --extra web --extra alerts -o requirements.lock
	$(COMPILE) --all-extras --group dev -c requirements.lock -o requirements-dev.lock
	# For the image, which installs wheels that are built already.
	$(LOCK) --all-extras -c requirements-dev.lock -o requirements-image.lock
	# The lowest direct versions of what is installed with the package, and the newest tools beside them.
	$(COMPILE) --all-extras --resolution lowest-direct -o requirements-floors.lock
	@mv requirements-floors.lock .floors.txt
	$(COMPILE) --all-extras --group dev -c .floors.txt -o requirements-floors.lock
	@rm .floors.txt

clean: ## remove .venv and every cache
	rm -rf .venv .venv-floors dist site .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Nothing here removes a package, so `serve` after `test` leaves the tools where they are.
$(RUNTIME): .venv/bin/python requirements.lock pyproject.toml
	$(call install,.venv,requirements.lock)
	@touch $@

$(DEV): .venv/bin/python requirements-dev.lock pyproject.toml
	$(call install,.venv,requirements-dev.lock)
	@.venv/bin/python -m tests.web.browsers
	@.venv/bin/python -m tests.pgbouncer
	@touch $(RUNTIME) $@

$(FLOORS): $(DEV) requirements-floors.lock
	@rm -rf .venv-floors
	@.venv/bin/python -m venv --without-pip .venv-floors
	$(call install,.venv-floors,requirements-floors.lock)
	@touch $@

# In a clone, `batch-system` is built beside the library, of the same version.
dist: tools ## build the wheels of batch-system-core and batch-system, and the source, into dist/
	@rm -rf dist
	@.venv/bin/python -m hatchling build
	@cd packaging/batch-system && ../../.venv/bin/python -m hatchling build -d ../../dist
	@ls -1 dist

release: tools ## make all that a release consists of, in dist/; nothing is tagged or published
	@.venv/bin/python tools/release.py

define install
@echo "Installing $(2) into $(1) …"
@[ -n "$(UV)" ] || .venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip >/dev/null
@$(INSTALL) --require-hashes -r $(2)
@$(INSTALL) --no-deps --no-build-isolation --editable .
@.venv/bin/python -m compileall -q batch_system service
endef

# An interpreter named on the command line or in the environment counts; the default takes any .venv that is there.
ifneq ($(origin PYTHON),file)
ifneq ($(shell cat .venv/.python 2>/dev/null),$(PYTHON))
.PHONY: .venv/bin/python
endif
endif

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo \
	"Python 3.11 or newer is needed, and '$(PYTHON)' is not one: install it, or name it (make PYTHON=python3.13 …)." >&2; exit 1; }
	@[ -n "$(UV)" ] || $(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo \
	"'$(PYTHON)' can't make virtual environments: install its venv module (on Debian: apt install python3-venv)." >&2; exit 1; }
	@rm -rf .venv
	@$(VENV)
	@echo "$(PYTHON)" >.venv/.python
