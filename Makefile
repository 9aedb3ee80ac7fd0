PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test figures clean

demo: .venv/installed
	$(BIN)/python examples/mnist_bandit.py

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

figures: .venv/installed
	$(BIN)/python examples/mnist_bandit.py --out docs
	$(BIN)/python benchmarks/step.py --out benchmarks/results
	$(BIN)/python benchmarks/ranks.py --out benchmarks/results
	$(BIN)/python benchmarks/scaling.py --out benchmarks/results --figure docs/scaling.png

clean:
	rm -rf .venv build dist *.egg-info
