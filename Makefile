# make reproduce   set up everything and run the laptop profile (PROFILE=smoke, full, … for another)
# make test        set up everything and run all tests, the notebooks with the smoke profile's loops among them
# make check       lint, types, and the quick tests, which need no model: while you work
# make lab         open the notebooks in JupyterLab
# make bench       time the fast paths beside plain versions of the same work, in 20 minutes (ONLY="scoring …": those rows)
PYTHON ?= python3
PROFILE ?= laptop
BIN := .venv/bin
READY := .venv/.ready
# Two processes, one thread each: small tensors gain nothing from a second thread.
PYTEST := TQDM_DISABLE=1 OMP_NUM_THREADS=1 PYTHONHASHSEED=0 $(BIN)/python -m pytest -q -n 2 --dist loadfile

.PHONY: setup reproduce test check bench lint types model lab nbval notebooks readme data lock clean

reproduce: $(READY)
	$(BIN)/python -m ember reproduce --profile $(PROFILE)

test: $(READY)
	$(MAKE) --jobs=2 lint types model
	$(PYTEST) tests

check: $(READY)
	$(MAKE) --jobs=2 lint types
	$(PYTEST) -m "not embedded and not slow" tests

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
	  || { echo "Python 3.11 is needed; name it with: make PYTHON=python3.11 …"; exit 1; }
	@echo "Setting up .venv (once, a few minutes)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: $(READY)
	$(BIN)/mypy

model: $(READY)
	$(BIN)/python -m ember fetch-model

# One notebook, or all, as they stand, with the smoke profile in place of the laptop's and results in a scratch folder:
# the checked cells must print what is committed. `make test` looks at the same cells of the smoke run.
NOTEBOOKS ?= $(sort $(wildcard notebooks/*.ipynb))
SCRATCH := $(CURDIR)/.cache

nbval: $(READY)
	@mkdir -p $(SCRATCH)/profiles && cp notebooks/params/smoke.yaml $(SCRATCH)/profiles/laptop.yaml
	TQDM_DISABLE=1 EMBER_PROFILES=$(SCRATCH)/profiles EMBER_RESULTS=$(SCRATCH)/results \
	  $(BIN)/python -m pytest -q -p no:cacheprovider --nbval-lax --nbval-cell-timeout=600 $(NOTEBOOKS)

bench: $(READY)
	$(BIN)/python -m benchmarks.run $(if $(ONLY),--only $(ONLY))

lab: $(READY)
	$(BIN)/jupyter lab notebooks

# Renew the checked outputs in the committed notebooks, from a run of the smoke profile.
notebooks: export EMBER_RESULTS := $(SCRATCH)/results
notebooks: $(READY)
	TQDM_DISABLE=1 $(BIN)/python -m ember reproduce --profile smoke
	$(BIN)/python notebooks/refresh.py

# Write the measured tables into README.md.
readme: $(READY)
	$(BIN)/python docs/pages.py

# Screen the candidate questions again.
data: $(READY)
	$(BIN)/python data/build_questions.py

# Pin what is installed now; the torch wheel's local version is left out.
lock: $(READY)
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > requirements.lock
	$(BIN)/python -m pip list --format=freeze | grep -i '^setuptools==' >> requirements.lock

clean:
	rm -rf .venv .cache .snakemake results/smoke results/cells results/relearning results/*/records results/*/notebooks results/*/edits
