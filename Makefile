# make demo          install, then text -> tokens -> a small GPT -> its HellaSwag score, on any machine, in minutes
# make test          install, then every test but a few long ones
# make test-long     those: more processes, more kills
# make test-fast     the tests that take less than two seconds, for the loop of work
# make test-faults   only the tests that kill, cut, flip and fill things, and a table of what is survived
# make test-parity   our HellaSwag against lm-evaluation-harness on 1,000 examples, three models: a quarter of an hour
# make rehearse      the CUDA path on a machine without a GPU: what runs, waits, moves and compiles (docs/cuda.md)
# make lint          formatting, lint and types
# make report        the paper of a run, build/report/research-report.pdf: RUN=runs/NAME, else the committed demo's
# make record        of a finished runs/demo: docs/results/demo, the numbers of README, the notebook's outputs, the pictures
# make clean         remove what the demo made (the environment stays)

PYTHON ?= python3
BIN := .venv/bin
RUN ?= docs/results/demo
# pip shows its bars to a person and only errors to a log
PIP := $(BIN)/pip --disable-pip-version-check $(shell test -t 2 || echo -qq)

.PHONY: setup demo report record test test-fast test-long test-faults test-parity rehearse lint clean

setup: .venv/installed

.venv/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, $(PYTHON) is older: make PYTHON=python3.12 setup"; exit 1; }
	$(PYTHON) -m venv .venv
	@# PyPI's torch for Linux brings gigabytes of CUDA. Without an NVIDIA GPU uv installs PyTorch's CPU build of the same
	@# version, unless pip is set up here to look for packages in places of its own.
	@if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null \
			&& ! $(BIN)/pip config list | grep -E 'index-url|find-links|no-index' >/dev/null; then \
		echo "No NVIDIA GPU here: installing PyTorch's CPU build"; \
		$(PIP) install uv==0.13.9 && $(BIN)/uv pip install --python $(BIN)/python --torch-backend=cpu --no-deps \
			$$(grep ^torch== requirements.txt) || echo "It cannot be had: pip installs PyPI's build instead"; fi
	$(PIP) install -r requirements.txt
	$(PIP) install --no-deps --no-build-isolation -e .
	$(BIN)/python -m aymen_gpt setup
	@touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(PIP) install -r requirements-dev.txt
	@touch $@

demo: setup
	$(BIN)/python -m aymen_gpt.commands.demo

report: setup
	$(BIN)/python -m paper.build $(RUN)

record: .venv/installed-dev
	$(BIN)/python -m tools.record runs/demo docs/results/demo
	$(BIN)/jupyter-execute --inplace GPT-nb.ipynb
	$(BIN)/python -m paper.build docs/results/demo
	pdftoppm -r 75 -f 5 -l 5 -png -singlefile build/report/research-report.pdf docs/images/paper
	$(BIN)/python -m tools.screenshot runs/demo docs/images

test: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 -m 'not long'

test-long: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 -m long

test-fast: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 -m 'not slow'

test-faults: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 -p tests.faults -m fault

test-parity: .venv/installed-dev
	PARITY_EXAMPLES=1000 $(BIN)/python -m pytest --timeout=3600 -n 2 tests/test_lm_eval_bridge.py

rehearse: .venv/installed-dev
	$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) install --no-deps triton==3.7.1
	$(BIN)/python -W ignore -m tools.rehearse

lint: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf data/builtin runs/demo build/report
