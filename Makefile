# make demo: the whole chain on the embedded marketplace. make test: every test. make pretrained: the checkpoint that ships, again.
# Each makes its own environment.
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

pretrained: .venv/demo
	PATH="$(CURDIR)/.venv/bin:$$PATH" bash pretrained.sh

test: .venv/test
	.venv/bin/ruff check .
	.venv/bin/python -m pytest -q

.PHONY: demo pretrained test
