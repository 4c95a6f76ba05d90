"""What pairs and drills teach, and what is left of it when a mixture follows (data/tasks.py).

The stages of a run that was tuned with drills answer new conversations of each kind, in the words of the training world; a
conversation's earlier answers are given. An answer, and the thought before it where there is one, is right where each of its tokens is
the likeliest one. And how many of the tokenizer's tokens stand in no answer that drills and sft2 train on: the output layer only
learns to avoid these.

    bash pretrained.sh && python -m benchmarks.drills --run runs/pretrained      # a minute, after 80 to 100
"""

import math
import random

import numpy as np
import torch

import cli
from benchmarks import keep
from data.market import LANGUAGES
from data.tasks import AFTER_DRILLS, CONVERSATIONS, DRILLS, TASKS, training
from generate import load_for_inference
from report import table
from sft import chat_of
from train import assemble

KINDS, MAKERS = (*DRILLS, "echo", "shelf"), {**TASKS, **CONVERSATIONS}
STAGES, EACH = ("sft1", "pairs", "drills", "sft2"), 8  # conversations of a kind and language
MADE = 3750  # training conversations of a language and stage in which answers' tokens are counted: 60,000 in all
WITHOUT = (("functions",), ("recital",), ("recital", "functions"))


def answers_right(model, tokenizer, kind):
    """Share of the answers in EACH conversations a language."""
    right = []
    for lang in LANGUAGES:
        rng = random.Random(f"drills-{kind}-{lang}")
        rng.phrasings = math.inf
        for _ in range(EACH):
            task = MAKERS[kind](lang, rng, "train")
            ids, mask = tokenizer.encode_chat(chat_of(task, "think" in task), thinking="think" in task)
            batch = assemble([[(ids, mask)]], len(ids))
            wrong = (model(batch["tokens"]).argmax(-1) != batch["targets"])[0].numpy()
            learnt = np.flatnonzero(batch["weights"][0])
            answers = np.split(learnt, np.flatnonzero(np.diff(learnt) > 1) + 1)
            right += [not wrong[answer].any() for answer in answers]
    return float(np.mean(right))


def never_an_answer(tokenizer, without=()):
    """How many tokens no answer of the training conversations has, some kinds of these left out."""
    seen = set()
    for shares in (DRILLS, AFTER_DRILLS):
        for task in training(0, MADE, {kind: share for kind, share in shares.items() if kind not in without}):
            ids, mask = tokenizer.encode_chat(chat_of(task, "think" in task), thinking="think" in task)
            seen.update(token for token, learnt in zip(ids, mask, strict=True) if learnt)
    return tokenizer.n_vocab - len(seen)


def tables(results):
    rows = [[stage, *(f"{100 * share:.0f}" for share in results[stage].values())] for stage in STAGES]
    never = [[arm, f"{n:,}"] for arm, n in results["never"].items()]
    return {
        "kinds": table(rows, ["right answers, %", *results[STAGES[0]]]),
        "never": table(never, ["conversations trained on", f"of {results['tokens']:,} tokens never in an answer"]),
    }


def main():
    args = cli.parse(__doc__, "run")
    results = {}
    with torch.inference_mode():
        for stage in STAGES:
            model, tokenizer = load_for_inference(args.run, torch.device("cpu"), stage)
            results[stage] = {kind: answers_right(model, tokenizer, kind) for kind in KINDS}
    results["tokens"] = tokenizer.n_vocab
    results["never"] = {"all": never_an_answer(tokenizer), **{f"without {' and '.join(w)}": never_an_answer(tokenizer, w) for w in WITHOUT}}
    keep("drills", results)
    print("\n\n".join(tables(results).values()))


if __name__ == "__main__":
    cli.run(main)
