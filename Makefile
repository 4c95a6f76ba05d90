# make demo: the whole chain on the embedded marketplace. make test: every test. make pretrained: the longer training of the checkpoint that ships.
# make bench: the short benchmarks, then every table and plot of RESULTS.md (under an hour on two cores). make bench-full: all but drills, corpus and gpu,
# the demo first (about seven hours and a half); DATA=folder of real text, PEERS=folder of public tokenizers for those that need them.
# Each makes its own environment.
PYTHON ?= python3

.venv/demo: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet .
	touch $@

.venv/test: .venv/demo
	.venv/bin/pip install --quiet ".[reference]"
	touch $@

.venv/bench: .venv/test
	.venv/bin/pip install --quiet ".[bench]"
	touch $@

demo: .venv/demo
	PATH="$(CURDIR)/.venv/bin:$$PATH" bash demo.sh

pretrained: .venv/demo
	PATH="$(CURDIR)/.venv/bin:$$PATH" bash pretrained.sh

bench: .venv/bench
	.venv/bin/python -m benchmarks

# Finished trainings in the .jsonl files would not be repeated; benchmarks.alignment starts from a reward model.
bench-full: .venv/bench demo
	rm -f benchmarks/results/*.jsonl
	rm -rf runs/alignment
	cp -r checkpoints/tiny runs/alignment
	.venv/bin/python reward.py --run runs/alignment
	cp runs/demo/report.json benchmarks/results/demo.json
	rm -rf runs/preferences
	cp -r checkpoints/tiny runs/preferences
	.venv/bin/python dpo.py --run runs/preferences
	.venv/bin/python otpo.py --run runs/preferences
	.venv/bin/python evaluate.py --run runs/preferences --tasks 10
	cp runs/preferences/report.json benchmarks/results/preferences.json
	.venv/bin/python -m benchmarks --full $(if $(DATA),--data "$(DATA)") $(if $(PEERS),--peers "$(PEERS)")

test: .venv/test
	.venv/bin/ruff check .
	.venv/bin/python -m pytest -q

.PHONY: demo pretrained bench bench-full test
