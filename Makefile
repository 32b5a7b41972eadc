# make demo   everything on made pictures: set-up, shard, train, annotate, evaluate, preview
# make test   set-up, ruff, mypy, and the default tests
PYTHON ?= python3
BIN := .venv/bin
OUTPUT ?= demo
DATA ?=

.PHONY: demo test test-all setup lint lock hashes audit clean

demo: setup
	$(BIN)/python -m jobs demo --output $(OUTPUT) $(if $(DATA),--data $(DATA))

test: lint
	$(BIN)/pytest -n 2 --dist loadfile
	@echo "All tests passed. Next: make demo, then open demo/preview/index.html."

test-all: lint
	$(BIN)/pytest -m "not gpu"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy pipeline jobs cluster benchmarks

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else f"Python 3.11 to 3.13 is needed, this is {v[0]}.{v[1]}; say make PYTHON=python3.12")'
	@echo "Installing the pinned packages into .venv (a few minutes at first) ..."
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,openvino,detect]'
	@touch $@

# the versions of everything installed, for a set that is known to work together
lock:
	$(BIN)/pip freeze --exclude-editable | sed -E 's/\+cpu$$//; s/\+cu[0-9]+$$//' | grep -E '^[A-Za-z0-9_.-]+==' > constraints.txt

# the same with the SHA-256 of each file, for the image; needs uv
hashes:
	uv pip compile pyproject.toml --extra detect --extra openvino --constraint constraints.txt --generate-hashes --python-version 3.11 --python-platform x86_64-unknown-linux-gnu --no-annotate --output-file cluster/requirements.txt

# known weaknesses of the image's packages; needs pip-audit, and its data from the network. Never without --strict: it says
# "none found" of what it can't look up
audit:
	pip-audit --strict --no-deps --disable-pip --requirement cluster/requirements.txt

clean:
	rm -rf .venv build *.egg-info
