# make demo: pretrain, evaluate and fine-tune on Fashion-MNIST.   make test: the tests.   Both start from nothing.
PYTHON ?= python3
VENV ?= .venv
OUT ?= demo
DATA ?=
MINUTES ?=
STEPS ?= 20000
BUILDERS ?= docker podman buildah
IMAGE ?= fcmae
BIN := $(VENV)/bin
# constraints.txt holds the versions the tests last passed with; pyproject.toml declares what is allowed.
# Without --no-compile pip compiles all of torch; Python compiles what it imports.
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --no-compile -c constraints.txt

.PHONY: demo test test-slow test-gpu test-tf test-clients test-minkowski test-rest faults test-faults chaos soak test-slurm fuzz golden golden-update audit lint format reference docs release image test-image demo-data clean

demo: $(VENV)/.demo demo-data
	$(BIN)/fcmae demo --out $(OUT) $(if $(DATA),--data $(DATA)) $(if $(MINUTES),--minutes $(MINUTES))

test: $(VENV)/.dev
	$(BIN)/python -m pytest

test-slow: $(VENV)/.dev demo-data
	$(BIN)/python -m pytest -m slow

test-gpu: $(VENV)/.dev
	$(BIN)/python -m pytest -m gpu

test-tf: $(VENV)/.dev
	$(BIN)/python -m pytest -m tf

test-clients: $(VENV)/.dev
	$(BIN)/python -m pytest -m clients

# Builds MinkowskiEngine the first time, six to seven minutes of two cores; later environments get the kept wheel.
test-minkowski: $(VENV)/.dev
	PYTHON=$(BIN)/python launch/install_minkowski.sh
	$(BIN)/python -m pytest -m minkowski

# test-slow, test-tf, test-clients and test-minkowski in one process: to collect the tests takes 15 CPU seconds.
test-rest: $(VENV)/.dev demo-data
	PYTHON=$(BIN)/python launch/install_minkowski.sh
	$(BIN)/python -m pytest -m "slow or tf or clients or minkowski"

# docs/tests.md, the whole of it; test-faults is the short form.
faults: $(VENV)/.dev
	$(BIN)/python -m pytest -m faults tests/faults

test-faults: $(VENV)/.dev
	FAULTS=short $(BIN)/python -m pytest -m faults tests/faults

# Random faults in all commands for MINUTES; test-faults has a short form.
chaos: $(VENV)/.dev
	$(BIN)/python -m tests.chaos minutes=$(or $(MINUTES),20)

# Whether memory, handles, threads, disk and the time of a step stay the same over STEPS; test-slow has a short form.
soak: $(VENV)/.dev
	$(BIN)/python -m benchmarks.soak steps=$(STEPS)

# Starts a SLURM of two nodes on this machine, from Debian's packages; needs root.
test-slurm: $(VENV)/.dev
	$(BIN)/python -m pytest -m slurm tests/slurm

# Random configs and damaged files, tests/fuzz; FUZZ=short: one case of a hundred; NAMES="image. tar": these targets.
fuzz: $(VENV)/.dev
	$(BIN)/python -m tests.fuzz $(NAMES)

# Runs of 20 steps against tests/golden/runs.json; golden-update BECAUSE='a line of CHANGELOG.md' writes it.
golden: $(VENV)/.dev
	$(BIN)/python -m pytest -m "slow or not slow" tests/unit/test_golden_runs.py

golden-update: $(VENV)/.dev
	$(BIN)/python -m tests.golden_runs $(if $(BECAUSE),--because "$(BECAUSE)")

# Vulnerabilities and licences of the dependencies; SBOM=FILE.json writes a list of all components. Needs a network.
audit: $(VENV)/.dev
	$(BIN)/python .ci/audit $(BIN)/python $(if $(SBOM),--sbom $(SBOM))

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# docs/config.md, from the dataclasses of fcmae/config; a test compares.
reference: $(VENV)/.dev
	$(BIN)/python -m benchmarks.reference > docs/config.md

# The site, from README.md, docs/ and docstrings, into site/; a broken link is an error.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# docs/release.md. Uploads nothing and needs no secret.
release: $(VENV)/.dev
	$(BIN)/python -m benchmarks.release

# The container image, by the first of BUILDERS that works; BUILD_ARGS are passed on.
image:
	@for builder in $(BUILDERS); do \
	    $$builder info >/dev/null 2>&1 && exec $$builder build $(BUILD_ARGS) -t $(IMAGE) .; \
	done; echo "no builder works here; install or start one of: $(BUILDERS)"; exit 1

# Builds the image and runs it, or checks what can be checked without a builder.
test-image: $(VENV)/.dev
	$(BIN)/python .ci/image

# Debian packages the data set; elsewhere `fcmae demo` downloads it or says how to get it.
demo-data:
	@if [ -z "$(DATA)" ] && [ ! -d /usr/share/datasets/fashion-mnist ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "installing Debian's package dataset-fashion-mnist"; \
	    (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq dataset-fashion-mnist) >/dev/null || true; \
	fi

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "Python 3.10 or newer is needed; name one with PYTHON=..., e.g. make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing the package and its dependencies into $(VENV), a few minutes the first time"
	$(PIP_INSTALL) -e '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing the package and the test tools into $(VENV), a few minutes the first time"
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@

$(VENV)/.docs: pyproject.toml constraints.txt | $(VENV)/.dev
	$(PIP_INSTALL) -e '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) build dist site
