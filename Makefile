# The commands of this checkout.  `make` alone lists them.

SHELL := /bin/bash
PYTHON := .venv/bin/python
WORKERS := 0  # processes that share the tests; 0: one, which is pytest itself

help:  ## list these commands
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 16

run: root setup build  ## install what is missing, start the daemon, run a demonstration pod, serve (ONCE=1: and end)
	@env --block-signal=INT $(PYTHON) -m crio_native.cli.demo $(if $(ONCE),--once)

test: root setup-tests build  ## the tests, from nothing, as CI runs them (ARGS="-k name" chooses, WORKERS=2 shares)
	@$(PYTHON) -m pytest --ignore=tests/perf -n $(WORKERS) $(ARGS)

bench: root setup-tests build  ## measure ours beside crun, runc and conmon; writes build/bench.json (ARGS=name chooses)
	@$(PYTHON) -m tests.perf $(ARGS)

check: setup  ## lint and types
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy

build:  ## compile the monitor into build/
	@$(MAKE) --no-print-directory -s -C helpers

clean:  ## remove what was built; .venv stays
	@rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# First of all: what can only fail should not install for a while before.
root:
	@[ "$$(id -u)" = 0 ] || { echo "make $(MAKECMDGOALS): run it as root: it makes namespaces, mounts and cgroups" >&2; exit 1; }

setup:
	@helpers/setup

setup-tests:
	@helpers/setup tests

# The monitor's compiler is one of the packages that setup installs.
build: | setup

.PHONY: help run test bench check build clean root setup setup-tests
