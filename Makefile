# Two commands on a fresh machine: `make demo` and `make test`. Each makes .venv and installs what it needs.
PYTHON ?= python3

.PHONY: demo test test-slow test-engines check docs bench clean

PYTEST = OMP_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses logical --maxprocesses 4 --durations 40 --durations-min 4

demo: .venv/installed
	.venv/bin/nusam demo $(ARGS)

test: .venv/installed .venv/test-data
	$(PYTEST) --dist loadfile -m "not slow" $(ARGS)

# What a change need not wait for: killed processes, clusters, whole demos, long trainings. The gate, .ci/run, runs both.
test-slow: .venv/installed .venv/test-data
	$(PYTEST) --dist loadfile --no-loadscope-reorder -m slow $(ARGS)

# DeepSpeed and JAX by themselves: with the former installed, Trainer and accelerate import other things.
test-engines: .venv-engines/installed
	OMP_NUM_THREADS=1 PYTHONPATH=src .venv-engines/bin/python -m pytest tests/engines $(ARGS)

check: .venv/installed
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --no-compile --constraint constraints.txt --editable ".[experiments,dev]"
	.venv/bin/python -W ignore -m compileall -q -j 0 .venv/lib >/dev/null || true  # on every core; some are for other Pythons
	touch $@

.venv-engines/installed: .venv/installed
	.venv/bin/python -m venv .venv-engines
	echo "$$(cd .venv/lib/python*/site-packages && pwd)" > .venv-engines/base.pth
	mv .venv-engines/base.pth .venv-engines/lib/python*/site-packages/
	DS_BUILD_OPS=0 .venv-engines/bin/pip install --quiet --constraint constraints.txt "deepspeed>=0.18" jax optax
	touch $@

.venv/test-data: .venv/installed tests/fetch_data.py
	.venv/bin/python -m tests.fetch_data $@ || echo "Without these the tests that need them are skipped."

bench: .venv/installed
	.venv/bin/pip install --quiet --constraint constraints.txt --editable ".[bench]"
	.venv/bin/python benchmarks/speed.py
	.venv/bin/python benchmarks/shares.py
	.venv/bin/python benchmarks/convolutions.py
	.venv/bin/python benchmarks/memory.py
	.venv/bin/python benchmarks/exactness.py
	.venv/bin/python benchmarks/launches.py
	.venv/bin/python benchmarks/breakeven.py
	.venv/bin/python benchmarks/breakdown.py
	.venv/bin/python benchmarks/communication.py

clean:
	rm -rf .venv .venv-engines dist
