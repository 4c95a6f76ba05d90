"""What instruction selection saves and costs: sft1 on all tasks, on those that data/selection.py chose, and on as many at random.

Each seed (initialisation and data order) trains its own base and from it every arm for the same number of steps, on two of the eight
languages. Accuracy is measured on the frozen held-out tasks that need no thought; differences are paired by seed.

    python -m benchmarks.selection      # about 15 minutes on two cores
"""

import random

import numpy as np

import cli
from benchmarks import keep
from benchmarks.tuning import LANGS, SEEDS, SFT1, base_model, marketplace, tuned
from data.selection import select
from data.tasks import fingerprint, tasks, training
from evaluate import accuracy, answer_tasks
from report import table
from sft import curriculum

KEEP = 0.3


def tables(results):
    everything, rows = results["arms"]["all"]["accuracy"], []
    for name, arm in results["arms"].items():
        points, against = 100 * np.array(arm["accuracy"]), 100 * np.subtract(arm["accuracy"], everything)
        paired = "" if name == "all" else f"{against.mean():+.1f} ± {against.std(ddof=1):.1f}"
        rows.append([name, f"{arm['tasks']:,}", ", ".join(f"{value:.1f}" for value in points), f"{points.mean():.1f}", paired])
    found = results["selection"]
    return {
        "found": table([[f"{n:,}" for n in found.values()]], ["tasks given", "no near duplicates", "clusters", "in no cluster", "chosen"]),
        "arms": table(rows, [f"{SFT1} steps of sft1 on", "tasks", "held-out accuracy, %, by seed", "mean", "against all, paired"]),
    }


def main():
    cli.parse(__doc__)
    documents, tokenizer = marketplace()
    every = [task for task in training(0, 7000) if task["id"].split("-")[1] in LANGS and "think" not in task]
    chosen, report = select(every, KEEP)
    print(report, flush=True)
    examples = {"all": every, "chosen": chosen, "as many at random": random.Random(0).sample(every, len(chosen))}
    test = [task for task in tasks("test", 0, 10) if task["lang"] in LANGS and "think" not in task]
    arms = {name: {"tasks": len(some), "accuracy": []} for name, some in examples.items()}
    for seed in range(SEEDS):
        base = base_model(documents, tokenizer, seed)
        for name, some in examples.items():
            model = tuned(base, "sft1", curriculum("sft1", some, seed), SFT1, tokenizer, seed)
            arms[name]["accuracy"].append(accuracy(test, [answer for _, answer in answer_tasks(model, tokenizer, test)])["overall"])
            print(seed, name, arms[name]["accuracy"][-1], flush=True)
    keep("selection", {"tasks_hash": fingerprint(test), "selection": report, "arms": arms})


if __name__ == "__main__":
    cli.run(main)
