# One target per duty, for people, hooks and CI alike. Each does its own set-up: .venv, torch, the tools, the native library; a second run
# finds them done. TORCH picks the version of torch (make test TORCH=2.12.0), PYTHON (3.11 or newer) what .venv is made from.

TORCH ?= 2.13.0
PYTHON ?= python3

export MAX_JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The stamp's name carries torch's version: asking for another one installs it and, through the stamp's age, builds again.
REQUIREMENTS := .venv/.requirements-$(TORCH)
LIBRARY := build/.library
CXX_FILES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

define PRINT_REQUIREMENTS
import tomllib
with open("pyproject.toml", "rb") as file:
    pyproject = tomllib.load(file)
extras = pyproject["project"]["optional-dependencies"]
requirements = pyproject["build-system"]["requires"] + extras["demo"] + extras["dev"]
print(*(each for each in requirements if not each.startswith("gradkernels")), sep="\n")
endef
export PRINT_REQUIREMENTS

.PHONY: help build demo test test-all fuzz lint format bench clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18

build: $(LIBRARY)  ## compile csrc/ into gradkernels/_C

demo: $(LIBRARY)  ## experiments on vanishing and exploding gradients; writes demo*.png
	.venv/bin/python -m gradkernels demo

test: $(LIBRARY)  ## pytest without the slow tests
	.venv/bin/python -m pytest

test-all: $(LIBRARY)  ## pytest with them: builds an sdist and a wheel too
	.venv/bin/python -m pytest -m ""

fuzz: $(LIBRARY)  ## 10,000 new examples for each test of tests/test_fuzz.py, where make test has the same 200
	.venv/bin/python -m pytest tests/test_fuzz.py --hypothesis-profile=fuzz

lint: $(REQUIREMENTS)  ## ruff, mypy and clang-format, changing nothing
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/clang-format --dry-run -Werror $(CXX_FILES)

format: $(REQUIREMENTS)  ## ruff and clang-format, rewriting files
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
	.venv/bin/clang-format -i $(CXX_FILES)

bench: $(LIBRARY)  ## every bench/bench_*.py in turn
	set -e; for script in bench/bench_*.py; do PYTHONPATH=. .venv/bin/python $$script; done

clean:  ## what the build left; .venv stays
	rm -rf build dist gradkernels.egg-info gradkernels/_C.*.so

# Folders are prerequisites too: their age tells of a file removed.
$(LIBRARY): $(REQUIREMENTS) setup.py $(shell find csrc)
	.venv/bin/python setup.py build_ext --inplace
	touch $@

$(REQUIREMENTS): pyproject.toml Makefile
	test -x .venv/bin/pip || $(PYTHON) -m venv .venv
	.venv/bin/python -c "$$PRINT_REQUIREMENTS" > .venv/requirements.txt
	.venv/bin/pip install $(if $(CI),--progress-bar off) torch==$(TORCH) -r .venv/requirements.txt
	rm -f .venv/.requirements-*
	touch $@
