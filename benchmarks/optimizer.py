"""What makes the steps of tuning on small batches count: AdamW's second beta, the rate, the size of a step, the size of the model.

Every arm trains a fresh model on sft2's mixture, thinking and direct, as the first third of a cosine schedule; the loss is the running mean
over about 50 steps of 1,536 tokens. One seed: good for differences of a fifth, not for small ones. "pre-trained" spends 400
steps of language modelling on the general documents first.

    python -m benchmarks.optimizer                      # all arms, some 50 minutes with one thread
    python -m benchmarks.optimizer --arms "beta2 0.99"
"""

import dataclasses
import time

import numpy as np
import torch

import cli
from benchmarks import keep, kept
from compass import CONFIGS, Compass, CompassConfig
from data import reader
from data.tasks import training
from report import table
from sft import ROWS, Chats, curriculum, sft_loss
from tokenizer import train as train_tokenizer
from train import Schedule, Tokenised, TokenRows, _train_step, language_model_loss, lr_at, make_optimizer

TINY, STEPS = dataclasses.replace(CONFIGS["tiny"], max_seq_len=1024), 1000
WIDE = CompassConfig(4, 192, 8, 4, 32, 16, 4, 2, 96, 4096, 1024)
ARMS = {  # name: (config, peak rate, rows of 256 tokens a step, beta2, steps of language modelling before)
    "beta2 0.95": (TINY, 3e-3, 6, 0.95, 0),
    "beta2 0.95, RoPE base 1e6": (dataclasses.replace(TINY, rope_base=1e6), 3e-3, 6, 0.95, 0),
    "beta2 0.95, twice the rate": (TINY, 6e-3, 6, 0.95, 0),
    "beta2 0.95, half the rows, twice the steps": (TINY, 3e-3, 3, 0.95, 0),
    "beta2 0.99": (TINY, 3e-3, 6, 0.99, 0),
    "beta2 0.999": (TINY, 3e-3, 6, 0.999, 0),
    "beta2 0.99, rate 2e-3": (TINY, 2e-3, 6, 0.99, 0),
    "beta2 0.99, rate 2e-3, 4 layers of 192": (WIDE, 2e-3, 6, 0.99, 0),
    "beta2 0.99, pre-trained": (TINY, 3e-3, 6, 0.99, 400),
}


def train(model, batches, loss_fn, steps, schedule):
    """(running mean of the loss at each quarter, seconds)."""
    optimizer, mean, quarters, began = make_optimizer(model, schedule.beta2), None, [], time.perf_counter()
    memory = 50 * STEPS / steps  # in steps; the same number of tokens for every size of step
    for step in range(steps):
        model.router_scale = float(np.interp(step, (0, 0.6 * steps), schedule.router))
        loss, *_ = _train_step(model, optimizer, batches(step), loss_fn, lr_at(step, schedule), torch.device("cpu"))
        mean = loss if mean is None else mean + (loss - mean) / memory
        if (step + 1) % (steps // 4) == 0:
            quarters.append(round(mean, 4))
    return quarters, round(time.perf_counter() - began)


def rows_of(chats, rows):
    """A step of so many packed rows; Chats itself takes ROWS, as long as no conversation is wider than a row."""
    assert chats.units_per_step == ROWS

    def at(step):
        whole = chats.batch(step * rows // ROWS)[0]
        start = step * rows % ROWS
        return [{name: tensor[start : start + rows] for name, tensor in whole.items()}]

    return at


def tables(results):
    rows = [[name, ", ".join(f"{loss:.2f}" for loss in r["loss at quarters"]), r["seconds"]] for name, r in results.items()]
    return {"arms": table(rows, ["", "loss after 250, 500, 750, 1,000 steps", "seconds"])}


def main():
    args = cli.parse(__doc__, arms=dict(help="one arm's name (default: all)"))
    documents = list(reader.documents(None, "general", 0))
    tokenizer = train_tokenizer(documents, TINY.vocab_size)
    chats = Chats(curriculum("sft2", training(0, 20_000), 0), tokenizer, TINY.max_seq_len, 0)
    results = kept("optimizer")
    for name, (config, peak, rows, beta2, before) in ARMS.items():
        if args.arms not in (None, name):
            continue
        torch.manual_seed(0)
        model, spent, steps = Compass(config), 0, STEPS * ROWS // rows
        if before:
            text = TokenRows(Tokenised(documents, tokenizer), 256, 0).batches(8, 8)
            schedule = Schedule(before, peak, peak / 30, 50, (1.0, 0.1), beta2=beta2)
            spent = train(model, text, language_model_loss, before, schedule)[1]
        router = (0.1, 0.1) if before else (1.0, 0.1)
        schedule = Schedule(3 * steps, peak, peak / 30, 50 if before else 100, router, beta2=beta2)
        losses, seconds = train(model, rows_of(chats, rows), sft_loss, steps, schedule)
        results[name] = {"loss at quarters": losses, "seconds": seconds + spent}
        print(f"{name:45} {losses} {seconds + spent} s", flush=True)
        keep("optimizer", results)


if __name__ == "__main__":
    cli.run(main)
