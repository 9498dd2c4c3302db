# Everything from a clean clone, on a machine with Python >= 3.10:
#     make run     the default experiment, from text to report (configs/cldr8.yaml)
#     make test    the tests
#     make bench   the benchmarks and their report
#     make docs    the documentation, into build/site
#     make finetune  a small language model, fine-tuned for eight languages (configs/finetune.yaml)
# Each sets up .venv first: exact versions (constraints.txt), this checkout installed editable, the native library where
# there is CMake and a C++ compiler. A second call finds it done.

PYTHON ?= python3
CONFIG ?= configs/cldr8.yaml
SET ?=
TESTS ?= tests
PYTEST_OPTIONS ?=
JOBS ?= 2
BENCH ?= quick

BIN := .venv/bin
STAMP := .venv/.stamp
INPUTS := setup.py pyproject.toml constraints.txt CMakeLists.txt $(wildcard kernels/csrc/*)
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help run finetune test bench docs lint setup clean distclean

help:
	@echo 'make run    train, compare and report: nspec run $$(CONFIG)'
	@echo '            CONFIG=configs/NAME.yaml          another experiment'
	@echo '            SET="train.updates=100 run.seed=2"  other options'
	@echo 'make finetune  neurons, LoRA and full fine-tuning of a language model: six minutes on two cores; takes SET'
	@echo 'make test   the tests; TESTS=tests/nn for a part, PYTEST_OPTIONS="-x -k name", JOBS=0 for one process'
	@echo 'make bench  operators, training steps, profiling and their report: ten minutes on two cores, into runs/bench/'
	@echo '            BENCH=full|quick|smoke            how much; smoke measures nothing, it shows that all runs'
	@echo 'make docs   the documentation site, into build/site; a broken link or an unknown name fails'
	@echo 'make lint   ruff (check and format) and mypy'
	@echo 'make setup  .venv alone; PYTHON=python3.12 chooses the Python that makes it'
	@echo 'make clean  remove build outputs and caches; make distclean: .venv too. Results in runs/ stay.'

run: $(STAMP)
	PYTHONUNBUFFERED=1 $(BIN)/nspec run $(CONFIG) $(foreach option,$(SET),--set '$(option)')

finetune: $(STAMP)
	PYTHONUNBUFFERED=1 $(BIN)/nspec finetune finetune $(foreach option,$(SET),--set '$(option)')

# Passive: threads that spin while they wait would take the other process's core.
test: $(STAMP)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile $(PYTEST_OPTIONS) $(TESTS)

bench: $(STAMP)
	$(BIN)/python -m bench --set $(BENCH)

# Nothing is loaded from a network, so the pages open from the disk.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "documentation: build/site/index.html"

# All three are run, so that one look shows everything. For mypy kernels/ lies at nspec/kernels, as when installed.
lint: $(STAMP)
	@rm -rf build/types && mkdir -p build/types/nspec
	@ln -s "$(CURDIR)"/nspec/* "$(CURDIR)/kernels" build/types/nspec/
	@ln -s "$(CURDIR)/bench" build/types/
	@status=0; \
	echo ruff check .; $(BIN)/ruff check . || status=1; \
	echo ruff format --check .; $(BIN)/ruff format --check . || status=1; \
	echo mypy -p nspec -p bench; (cd build/types && \
	  ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../mypy -p nspec -p bench) || status=1; \
	exit $$status

setup: $(STAMP)

$(STAMP): $(INPUTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: Python >= 3.10 is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1); give one: make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv || { \
	  echo "error: $(PYTHON) cannot make a virtual environment; Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PIP) install -c constraints.txt torch setuptools
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[mt,tuning,typology,test,bench,docs]'
	@$(BIN)/python -c 'from nspec.kernels.common import native; print("native operators:", native.why_not() or "built")'
	@touch $@

clean:
	rm -rf $(STAMP) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks kernels/common/*.so
	find nspec kernels tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv
