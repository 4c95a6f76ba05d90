"""How the benchmarks time, and where they keep what they measured: results/<name>.json, and results/<name>.jsonl for trainings that are
not repeated. Times and rates are kept as their quartiles over the rounds, [first, median, third]."""

import json
import os
import statistics
import time

from cli import write_atomically, write_jsonl

RESULTS = os.path.join(os.path.dirname(__file__), "results")


def timed(arms, rounds):
    """{name: seconds of each round} of callables that take turns; one round of warm-up."""
    seconds = {name: [] for name in arms}
    for i in range(rounds + 1):
        for name, arm in arms.items():
            began = time.perf_counter()
            arm()
            if i:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def quartiles(values):
    return statistics.quantiles(values, n=4, method="inclusive")


def quartiles_of(arms):
    """{name: quartiles} of {name: values}."""
    return {name: quartiles(values) for name, values in arms.items()}


def ratios(above, below):
    """Quartiles of the ratio in each round."""
    return quartiles([a / b for a, b in zip(above, below, strict=True)])


def best_peer(seconds):
    """The quickest by its median of the arms whose names begin with "transformers"."""
    return min((name for name in seconds if name.startswith("transformers")), key=lambda name: statistics.median(seconds[name]))


def shown(found, digits=0, scale=1):
    """Quartiles as text: the median, and between which two values half of the rounds lie."""
    first, median, third = (f"{scale * value:,.{digits}f}" for value in found)
    return f"{median} ({first} to {third})"


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
