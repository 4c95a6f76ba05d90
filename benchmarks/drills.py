"""What the drills teach, and what is left of it when a mixture follows (data/tasks.py).

The stages of a run that was tuned with drills answer new conversations of each kind, in the words of the training world; a
conversation's earlier answers are given. An answer is right where each of its tokens is the likeliest one.

    bash pretrained.sh && python -m benchmarks.drills --run runs/pretrained      # a minute, after an hour and a quarter
"""

import json
import math
import os
import random

import numpy as np
import torch

import cli
from benchmarks.vocabulary import RESULTS
from data.market import LANGUAGES
from data.tasks import CONVERSATIONS
from generate import load_for_inference
from report import table
from train import assemble

KINDS = ("echo", "recital", "functions", "rules", "word_pairs", "number_pairs", "fitting", "sameness", "listing", "shelf")
STAGES, EACH = ("sft1", "drills", "sft2"), 8  # conversations of a kind and language


def answers_right(model, tokenizer, kind):
    """Share of the answers in EACH conversations a language."""
    right = []
    for lang in LANGUAGES:
        rng = random.Random(f"drills-{kind}-{lang}")
        rng.phrasings = math.inf
        for _ in range(EACH):
            task = CONVERSATIONS[kind](lang, rng, "train")
            ids, mask = tokenizer.encode_chat([*task["messages"], {"role": "assistant", "content": task["answer"]}])
            batch = assemble([[(ids, mask)]], len(ids))
            wrong = (model(batch["tokens"]).argmax(-1) != batch["targets"])[0].numpy()
            learnt = np.flatnonzero(batch["weights"][0])
            answers = np.split(learnt, np.flatnonzero(np.diff(learnt) > 1) + 1)
            right += [not wrong[answer].any() for answer in answers]
    return float(np.mean(right))


def tables(results):
    rows = [[stage, *(f"{100 * results[stage][kind]:.0f}" for kind in KINDS)] for stage in STAGES]
    return {"kinds": table(rows, ["right answers, %", *KINDS])}


def main():
    args = cli.parse(__doc__, "run")
    results = {}
    with torch.inference_mode():
        for stage in STAGES:
            model, tokenizer = load_for_inference(args.run, torch.device("cpu"), stage)
            results[stage] = {kind: answers_right(model, tokenizer, kind) for kind in KINDS}
    with open(os.path.join(RESULTS, "drills.json"), "w") as file:
        json.dump(results, file, indent=1)
    print(tables(results)["kinds"])


if __name__ == "__main__":
    cli.run(main)
