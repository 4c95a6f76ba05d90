"""What instruction selection saves and costs: sft1 on all tasks, on those that data/selection.py chose, and on as many at random.

Every arm starts from the run's last pre-training stage and trains the same number of steps; accuracy is measured on the frozen
held-out tasks. One seed for each arm unless --seeds says more.

    make demo && python -m benchmarks.selection --run runs/demo        # about 12 minutes on two cores
"""

import random

import numpy as np
import torch

import cli
from benchmarks import keep
from checkpoint import load_latest, load_model
from data.selection import select
from data.tasks import fingerprint, tasks, training
from evaluate import accuracy, answer_tasks
from report import table
from sft import STAGES, Chats, curriculum
from tokenizer import Tokenizer
from train import _train_step, language_model_loss, lr_at, make_optimizer

PER_LANGUAGE, KEEP, STEPS = 1500, 0.3, 800


def tune(run, tokenizer, examples, seed):
    """sft1 for STEPS steps on the examples, the router's losses at full weight; returns the model."""
    torch.manual_seed(seed)
    model = load_model(load_latest(run, "long", torch.device("cpu")), torch.device("cpu"))
    chats = Chats(curriculum("sft1", examples, seed), tokenizer, model.config.max_seq_len, seed)
    schedule = STAGES["sft1"][1]._replace(steps=STEPS)
    optimizer = make_optimizer(model, schedule.beta2)
    for step in range(STEPS):
        _train_step(model, optimizer, chats.batch(step), language_model_loss, lr_at(step, schedule), torch.device("cpu"))
    return model.eval()


def tables(results):
    arms = {"all": "all", "chosen": "selected", "as many at random": "random"}
    rows = [[name, f"{results[key]['tasks']:,}", f"{100 * results[key]['mean']:.1f}"] for name, key in arms.items()]
    found = results["selection"]
    return {
        "found": table([[f"{n:,}" for n in found.values()]], ["tasks given", "no near duplicates", "clusters", "in no cluster", "chosen"]),
        "arms": table(rows, [f"{STEPS} steps of sft1 on", "tasks", "held-out accuracy, %"]),
    }


def main():
    args = cli.parse(__doc__, "run", seeds=dict(type=int, default=1, help="seeds for each arm"))
    tokenizer = Tokenizer.load(args.run)
    every = [task for task in training(0, PER_LANGUAGE) if "think" not in task]
    chosen, report = select(every, KEEP)
    print(report, flush=True)
    arms = {"all": every, "selected": chosen, "random": random.Random(0).sample(every, len(chosen))}
    test = [task for task in tasks("test", 0, 5) if "think" not in task]
    results = {"selection": report, "tasks_hash": fingerprint(test)}
    for name, examples in arms.items():
        scores = []
        for seed in range(args.seeds):
            model = tune(args.run, tokenizer, examples, seed)
            scores.append(accuracy(test, [answer for _, answer in answer_tasks(model, tokenizer, test)])["overall"])
        results[name] = {"tasks": len(examples), "accuracy": scores, "mean": float(np.mean(scores))}
        print(name, results[name], flush=True)
    keep("selection", results)


if __name__ == "__main__":
    cli.run(main)
