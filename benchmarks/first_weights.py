"""How soon does a small model learn to copy? Independent first weights against ours, where the head is made from the embedding
(compass.first_head) and queries begin near their keys (compass.init_parameter).

Copying is most of what instruction tuning has to teach: `tiny` has the general stage and 1,000 steps of sft1, as in the demo but for the
length, and the loss falls when it has learnt to copy. Three seeds of weights and data, the same for both; finished trainings are
kept in benchmarks/results/first_weights.jsonl and not repeated.

    python -m benchmarks.first_weights      # half an hour with one thread
"""

import itertools
import json
import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

import cli
from benchmarks import RESULTS, finished, keep, keep_finished
from benchmarks.tuning import train
from compass import CONFIGS, Compass
from data import market
from data.tasks import training
from report import save, table
from sft import EXERCISES, PER_STEP, STAGES, Chats, curriculum, sft_loss
from tokenizer import train as train_tokenizer
from train import RECIPES, Tokenised, TokenRows, language_model_loss

SEEDS, STEPS, WINDOW = 3, 1000, 50  # losses are means of so many steps
KINDS = ("independent", "ours")


@torch.no_grad()
def first_model(seed, kind):
    """`tiny` with first weights of one kind; all others are the same."""
    torch.manual_seed(seed)
    model = Compass(CONFIGS["tiny"])
    c = model.config
    if kind == "independent":
        queries = (block.attention.qkv.weight[: c.n_heads * c.head_dim] for block in model.blocks)
        for weight in (model.head.weight, *queries):
            nn.init.normal_(weight, std=c.dim**-0.5)
    return model


def losses(model, tokenised, tokenizer, seed):
    """The loss of each step of sft1, after the general stage."""
    recipe, logged = RECIPES["tiny"]["general"], []
    rows = TokenRows(tokenised, recipe.seq_len, seed)
    train(model, rows.batches(recipe.rows, recipe.micro_rows), language_model_loss, recipe.schedule, f"general {seed}")
    chats = Chats(curriculum("sft1", training(seed, PER_STEP * STEPS, *EXERCISES["sft1"]), seed), tokenizer, 1024, seed)

    def logging(model, batch):
        loss, metrics = sft_loss(model, batch)
        logged.append(metrics["lm"].item())
        return loss, metrics

    train(model, chats.batch, logging, STAGES["sft1"][1]._replace(steps=STEPS), f"sft1 {seed}")
    return np.convolve(logged, np.ones(WINDOW) / WINDOW, "valid")[::WINDOW].round(4).tolist()


def tables(results):
    rows = []
    for kind, runs in results.items():
        below = [next((str(WINDOW * (i + 1)) for i, loss in enumerate(run) if loss < 1), "never") for run in runs]
        rows.append([kind, ", ".join(below), ", ".join(f"{run[-1]:.2f}" for run in runs)])
    return {"losses": table(rows, ["first weights", "steps until the loss is below 1 nat", f"loss after {STEPS:,} steps"])}


def plot(results, path):
    figure, axis = plt.subplots(figsize=(5, 3))
    for colour, (kind, runs) in zip(("0.6", "tab:blue"), results.items(), strict=True):
        for i, run in enumerate(runs):
            axis.plot(WINDOW * np.arange(1, len(run) + 1), run, color=colour, linewidth=1, label=None if i else kind)
    axis.set(xlabel="step of sft1", ylabel="loss (nats)", ylim=(0, 3))
    axis.legend(fontsize=8)
    save(figure, path)


def main():
    cli.parse(__doc__)
    documents = list(market.documents("general", 0))
    tokenizer = train_tokenizer(documents, CONFIGS["tiny"].vocab_size)
    tokenised, runs = Tokenised(documents, tokenizer), finished("first_weights")
    for seed, kind in itertools.product(range(SEEDS), KINDS):
        if any(run["seed"] == seed and run["kind"] == kind for run in runs):
            continue
        runs.append({"seed": seed, "kind": kind, "loss": losses(first_model(seed, kind), tokenised, tokenizer, seed)})
        print(json.dumps(runs[-1]), flush=True)
        keep_finished("first_weights", runs)
    results = keep("first_weights", {kind: [run["loss"] for run in runs if run["kind"] == kind] for kind in KINDS})
    plot(results, os.path.join(RESULTS, "first_weights.png"))


if __name__ == "__main__":
    cli.run(main)
