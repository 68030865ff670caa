# make quickstart   environment, then the whole way on real text: runs/quickstart
# make test         environment, then all tests            (ARGS="tests/losses -x" for some of them)
# make lint         ruff and mypy
# make fuzz         foreign input of every kind, mutated, for as long as you like (MINUTES=30)
# make bench        side by side with peers: eval/results  (BENCH=eval/benchmarks/startup.py for one, with ARGS)
#
# The environment is .venv, made once and made again when pyproject.toml or the constraints change.
#   make GPU=1 ...            torch as the registry gives it (CUDA), not the version of constraints-cpu.txt
#   make CONSTRAINTS= ...     the same without a GPU: where the registry does not have that version
#   make PYTHON=python3.12 ...

PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11,\
	$(shell $(name) -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $(name))))
CONSTRAINTS ?= $(if $(GPU),,constraints-cpu.txt)
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
BENCH ?= $(wildcard eval/benchmarks/*.py)

# Libraries that start threads in every process of a pool, and print advice about it.
export TOKENIZERS_PARALLELISM := false

.PHONY: quickstart test lint fuzz bench clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/.installed
	$(BIN)/rankdistill run quickstart --out runs/quickstart

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fuzz: $(VENV)/.installed-dev
	$(BIN)/python -m tests.fuzz --minutes $(or $(MINUTES),10) $(ARGS)

bench: $(VENV)/.installed-dev
	@for script in $(BENCH); do \
		echo "== $$script"; $(BIN)/python "$$script" $(ARGS) || exit 1; \
	done

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find rankdistill tests eval -name __pycache__ -type d -exec rm -rf {} +

# A stamp is touched last: an install that failed or was interrupted leaves none and is begun again.
$(VENV)/.installed: pyproject.toml constraints-cpu.txt
	$(call install,.)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints-cpu.txt
	$(call install,.[dev])
	@touch $(VENV)/.installed $@

define install
	@$(or $(PYTHON),python3) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "error: rankdistill needs Python 3.11 or newer; $(or $(PYTHON),python3) is" \
			"$$($(or $(PYTHON),python3) --version 2>&1 || echo missing). Name one: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@rm -f $(VENV)/.installed $(VENV)/.installed-dev
	@echo "installing into $(VENV) (some minutes the first time)"
	@$(or $(PYTHON),python3) -m venv $(VENV) || { \
		echo "error: $(PYTHON) cannot make a virtual environment: install its venv module (Debian: python3-venv)" >&2; exit 2; }
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '$(1)' || { \
		echo "error: the installation failed.$(if $(CONSTRAINTS), If the registry in use does not have the torch of $(CONSTRAINTS):" \
			"make CONSTRAINTS= $(or $(MAKECMDGOALS),quickstart))" >&2; exit 1; }
endef
