# Every command a person or CI runs. Needs python3 (3.11 or newer, with venv), make and git; the rest goes into .venv.

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
PY := $(VENV)/bin/python

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup lock run demo test test-unit lint type fmt proto proto-check images bench soak check rfc clean debian-packages

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## make .venv from requirements.lock; quick the second time

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "sip-pbx needs Python 3.11 or newer; \"$(PYTHON)\" is $$($(PYTHON) -V 2>&1). Choose another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "\"$(PYTHON)\" lacks the venv module. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "setting up $(VENV) (a minute the first time)"
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv --clear $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

COMPILE := uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-emit-find-links \
  --custom-compile-command "make lock"

lock: ## resolve pyproject.toml into requirements*.lock: hashed, without addresses
	$(COMPILE) pyproject.toml --all-extras --output-file requirements.lock
	$(COMPILE) pyproject.toml --no-annotate --constraint requirements.lock --output-file requirements-runtime.lock
	echo hatchling | $(COMPILE) - --no-annotate --constraint requirements.lock --output-file requirements-build.lock

run: setup ## start the supervised pair on embedded defaults; Ctrl-C stops it
	@exec $(VENV)/bin/sippbx run $(ARGS)

demo: setup ## two scripted phones talk through the pair for five seconds
	@exec $(VENV)/bin/sippbx demo $(ARGS)

test: setup debian-packages lint type proto-check ## everything but soak
	pytest --cov --cov-report=term $(ARGS)
	python tools/coverage_floors.py

test-unit: setup ## the pure tests
	pytest tests/unit $(ARGS)

soak: setup debian-packages ## what takes longer than `make test` may
	pytest -m soak --timeout=3600 $(ARGS)

lint: setup ## style, formatting, import contracts, docs/rfc.md fresh
	ruff check .
	ruff format --check .
	lint-imports --no-logo
	python tools/rfc_matrix.py --check
	hadolint Dockerfile

type: setup ## mypy, strict
	mypy

fmt: setup ## format and fix what can be fixed
	ruff format .
	ruff check --fix .
	buf format --write

proto: setup ## generate the stubs
	buf generate

proto-check: setup ## contracts: lint, format, stubs fresh, nothing broken since the newest tag or the baseline
	python tools/proto_check.py

ENGINE ?= podman
IMAGE_TAG ?= dev

images: ## build both images: make images ENGINE=docker PYTHON_IMAGE=python:3.13-slim IMAGE_TAG=1.2
	for plane in control dataplane; do \
	  $(ENGINE) build $(if $(PYTHON_IMAGE),--build-arg PYTHON_IMAGE=$(PYTHON_IMAGE)) --target $$plane --tag sip-pbx-$$plane:$(IMAGE_TAG) . || exit 1; \
	done

bench: setup ## figures, with the command that gave each
	python -m bench $(ARGS)

check: test ## what CI runs

rfc: setup ## print which test holds which RFC section; writes docs/rfc.md
	python tools/rfc_matrix.py

debian-packages:
	@tools/debian_packages

clean: ## remove everything that is made
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .coverage htmlcov dist build
	find control dataplane sippbx tests tools -name __pycache__ -type d -exec rm -rf {} +
