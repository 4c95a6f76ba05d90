"""Where the benchmarks keep what they measured: results/<name>.json, and results/<name>.jsonl for trainings that are not repeated."""

import json
import os

from cli import write_atomically, write_jsonl

RESULTS = os.path.join(os.path.dirname(__file__), "results")


def kept(name):
    """The figures in results/<name>.json; {} where there are none."""
    path = os.path.join(RESULTS, f"{name}.json")
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def keep(name, results):
    """Write results/<name>.json, whole or not at all; return the figures as they will be read again (all keys are text)."""
    text = json.dumps(results, indent=1)
    write_atomically(os.path.join(RESULTS, f"{name}.json"), text.encode())
    return json.loads(text)


def finished(name):
    """The trainings in results/<name>.jsonl, a dict each; [] where there are none."""
    path = os.path.join(RESULTS, f"{name}.jsonl")
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def keep_finished(name, runs):
    """Write results/<name>.jsonl, whole or not at all."""
    write_jsonl(os.path.join(RESULTS, f"{name}.jsonl"), runs)
