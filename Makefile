# make demo: the whole chain on the embedded marketplace. make test: every test. Each makes its own environment.
PYTHON ?= python3

.venv/demo: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet .
	touch $@

.venv/test: .venv/demo
	.venv/bin/pip install --quiet ".[reference]"
	touch $@

demo: .venv/demo
	PATH="$(CURDIR)/.venv/bin:$$PATH" bash demo.sh

test: .venv/test
	.venv/bin/ruff check .
	.venv/bin/python -m pytest -q

.PHONY: demo test
