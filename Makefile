# make quickstart   environment, then the whole way on real text: runs/quickstart
# make test         environment, then all tests            (ARGS="tests/losses -x" for some of them)
# make test-newest  the same in .venv-newest: the newest libraries that pip finds today
# make test-lowest  the same in .venv-lowest: each library in the lowest version that pyproject.toml admits
#                  (JOBS=0 in one process; otherwise one more than there are cores, as tests wait too; eight at most)
# make lint         ruff and mypy
# make docs         the documentation's site, built strictly: site/index.html
# make fuzz         foreign input of every kind, mutated, for as long as you like (MINUTES=30)
# make bench        side by side with peers: eval/results  (BENCH=eval/benchmarks/startup.py for one, with ARGS)
# make GPU=1 gpu    every part on one GPU, in minutes: a table, and eval/results/gpu.md
# make lock         renews constraints.txt and constraints-lowest.txt: after every change of a requirement
#
# The environment is .venv, made once and made again when pyproject.toml or the constraints change: exactly the
# versions of constraints.txt, which were tested, and the CPU build of torch that constraints-cpu.txt names.
#   make GPU=1 ...            torch as the registry gives it (CUDA), for a machine with a GPU
#   make PYTHON=python3.12 ...

PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11,\
	$(shell $(name) -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $(name))))
TORCH := $(if $(GPU),,constraints-cpu.txt)
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
JOBS ?= $(shell $(PYTHON) -c 'import os; print((os.cpu_count() or 1) + 1)')
PYTEST := python -m pytest -n $(JOBS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder
# Without those that need arguments, or a GPU.
BENCH ?= $(filter-out %/gpu.py %/effectiveness.py,$(wildcard eval/benchmarks/*.py))

# Libraries that start threads in every process of a pool, and print advice about it.
export TOKENIZERS_PARALLELISM := false

.PHONY: quickstart test test-newest test-lowest lint docs fuzz bench gpu lock clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/.installed
	$(BIN)/rankdistill run quickstart --out runs/quickstart

test: $(VENV)/.installed-dev
	$(BIN)/$(PYTEST) $(ARGS)

test-newest:
	$(call install,.venv-newest,.[dev],$(TORCH),--upgrade --upgrade-strategy eager)
	.venv-newest/bin/$(PYTEST) $(ARGS)

test-lowest: .venv-lowest/.installed
	.venv-lowest/bin/$(PYTEST) $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Not --quiet: MkDocs does not count a warning that it does not print.
docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 HF_HUB_OFFLINE=1 $(BIN)/mkdocs build --strict

fuzz: $(VENV)/.installed-dev
	$(BIN)/python -m tests.fuzz --minutes $(or $(MINUTES),10) $(ARGS)

bench: $(VENV)/.installed-dev
	@for script in $(BENCH); do \
		echo "== $$script"; $(BIN)/python "$$script" $(ARGS) || exit 1; \
	done

gpu: $(VENV)/.installed-dev
	$(BIN)/python eval/benchmarks/gpu.py $(ARGS)

# torch is left out: which build of it and of CUDA a machine needs is its own affair.
UV := .venv-lock/bin/uv pip compile -q --upgrade --python-version 3.11 --extra dev --no-emit-package torch --no-annotate \
	--custom-compile-command "make lock" -c constraints-cpu.txt pyproject.toml

lock:
	$(or $(PYTHON),python3) -m venv .venv-lock
	.venv-lock/bin/python -m pip install -qq --disable-pip-version-check --upgrade uv
	$(UV) --universal -o constraints.txt
	$(UV) --resolution lowest-direct -o constraints-lowest.txt

clean:
	rm -rf $(VENV) .venv-newest .venv-lowest .venv-lock build dist site *.egg-info \
		.pytest_cache .mypy_cache .ruff_cache .hypothesis
	find rankdistill tests eval -name __pycache__ -type d -exec rm -rf {} +

# A stamp is touched last: an install that failed or was interrupted leaves none and is begun again.
$(VENV)/.installed: pyproject.toml constraints.txt constraints-cpu.txt
	$(call install,$(VENV),.,constraints.txt $(TORCH))
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt constraints-cpu.txt
	$(call install,$(VENV),.[dev],constraints.txt $(TORCH))
	@touch $(VENV)/.installed $@

.venv-lowest/.installed: pyproject.toml constraints-lowest.txt constraints-cpu.txt
	$(call install,.venv-lowest,.[dev],constraints-lowest.txt $(TORCH))
	@touch $@

# $(call install,ENVIRONMENT,WHAT,CONSTRAINTS,OPTIONS): the variables hold the tools that build a package to the
# constraints too (the second is how pip 25.3 and later are told).
define install
	@$(or $(PYTHON),python3) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "error: rankdistill needs Python 3.11 or newer; $(or $(PYTHON),python3) is" \
			"$$($(or $(PYTHON),python3) --version 2>&1 || echo missing). Name one: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@rm -f $(1)/.installed $(1)/.installed-dev
	@echo "installing into $(1) (some minutes the first time)"
	@$(or $(PYTHON),python3) -m venv $(1) || { \
		echo "error: $(PYTHON) cannot make a virtual environment: install its venv module (Debian: python3-venv)" >&2; exit 2; }
	@PIP_CONSTRAINT='$(strip $(3))' PIP_BUILD_CONSTRAINT='$(strip $(3))' $(1)/bin/python -m pip install -qq \
		--disable-pip-version-check $(4) -e '$(2)' || { \
		echo "error: the installation failed. 'conflict' above: pyproject.toml and $(3) disagree, which 'make lock' mends." \
			"$(if $(TORCH),No such torch above: 'make GPU=1 $(or $(MAKECMDGOALS),quickstart)' takes the registry's.)" >&2; exit 1; }
endef
