"""Does the long stage with a larger RoPE base (ABF) make long texts usable, and what does it cost on short ones? (v2 §2.3.)

One model learns to find parcels in texts of 256 tokens, beside plain documents, and goes on for as many tokens again in three
ways: on texts of 256 tokens, on texts of 1024 tokens with the RoPE base unchanged, and on those with ABF (base 1e6). Each is asked
for a parcel hidden at five depths, and for one line of many, in texts from 128 to 2048 tokens; and its bits per byte on
short documents are measured. English only, because retrieval from scratch takes long; the cities to be found have weight 1,
plain text 0.03, and 0.3 once finding is learnt. Three seeds of initialisation and data; finished ones are kept in
benchmarks/results/long_context.jsonl.

    python -m benchmarks.long_context      # an hour and a half with one thread
"""

import dataclasses
import os
import random

import numpy as np
import torch

import cli
from benchmarks import RESULTS, finished, keep, keep_finished
from benchmarks.tuning import train
from compass import CONFIGS, Compass
from data import market
from evaluate import bits_per_byte, retrieval
from report import plot_needles, table
from tokenizer import train as train_tokenizer
from train import RECIPES, Tokenised, TokenRows, assemble, language_model_loss

SEEDS, STEPS, LONG_STEPS = 3, 2000, 300
LENGTHS = (128, 256, 512, 1024, 1536, 2048)


def retrieval_row(tokenizer, rng, length):
    """[(ids, mask), …] filling one row: one to four lines among pages, then the lines again; mainly their cities are to be predicted."""
    row, room = [], length
    while room > 40:
        entries = rng.randint(1, 4)
        size = rng.randint(40, room)
        lines = market.ledger_lines("en", rng, entries)
        body, used = list(lines), 2 * sum(len(tokenizer.encode(line)) + 2 for line in lines)
        while used < size:
            body.append(market.page(market.draw_product(rng, "train"), "en", rng, "train"))
            used += len(tokenizer.encode(body[-1])) + 2
        rng.shuffle(body)
        ids = tokenizer.encode("\n\n".join(body))
        mask = [0] * len(ids)
        for line in rng.sample(lines, entries):
            name, city = line.split(":")
            asked, answer = tokenizer.encode("\n\n" + name + ":"), tokenizer.encode(city)
            ids, mask = ids + asked + answer, mask + [0.02] * len(asked) + [1] * len(answer)
        if len(ids) > room:
            continue
        row.append((ids, mask))
        room -= len(ids)
    return row


def train_on(model, tokenised, tokenizer, length, rows, schedule, seed, weight):
    """A quarter of the rows are plain documents, whose tokens have that weight, the others exercises in finding."""
    plain, quarter = TokenRows(tokenised, length, seed), rows // 4

    def batches(step):
        rng = random.Random(f"{seed}-{length}-{step}")
        batch = [[(ids, weight * mask) for ids, mask in plain.row(i)] for i in range(step * quarter, (step + 1) * quarter)]
        batch += [retrieval_row(tokenizer, rng, length) for _ in range(rows - quarter)]
        return [assemble(batch, length)]

    return train(model, batches, language_model_loss, schedule, f"{length} tokens, base {model.config.rope_base:g}")


def measure(model, tokenizer, held, seed):
    bits = float(np.mean(list(bits_per_byte(model, tokenizer, held).values())))
    return {**retrieval(model, tokenizer, LENGTHS, seed=seed, n=20, langs=("en",)), "bits": bits}


WAYS = {"short texts, base 1e4": (256, 16, 1e4), "long texts, base 1e4": (1024, 4, 1e4), "long texts, base 1e6 (ABF)": (1024, 4, 1e6)}


def one_seed(tokenised, tokenizer, held, seed):
    """{way of going on: figures}, and those of the model that all start from."""
    torch.manual_seed(seed)
    general, long = (RECIPES["tiny"][stage] for stage in ("general", "long"))
    schedule = general.schedule._replace(steps=STEPS)
    short = train_on(Compass(CONFIGS["tiny"]), tokenised, tokenizer, general.seq_len, general.rows, schedule, seed, 0.03)
    figures = {"before": measure(short, tokenizer, held, seed)}
    for name, (length, rows, base) in WAYS.items():
        model = Compass(dataclasses.replace(short.config, rope_base=base))
        model.load_state_dict(short.state_dict())
        schedule = long.schedule._replace(steps=LONG_STEPS)
        figures[name] = measure(train_on(model, tokenised, tokenizer, length, rows, schedule, seed + SEEDS, 0.3), tokenizer, held, seed)
    return figures


def tables(results):
    rows = []
    for name, runs in results.items():
        needles, lines = (100 * np.mean([run[key] for run in runs], axis=0) for key in ("needles", "lines"))
        bits = [run["bits"] for run in runs]
        found = (f"{n:.0f}, {line:.0f}" for n, line in zip(needles.mean(1), lines, strict=True))
        rows.append([name, f"{np.mean(bits):.3f} ± {np.std(bits, ddof=1):.3f}", *found])
    return {"found": table(rows, ["needles, lines found, %", "bits per byte", *(f"{length} tokens" for length in LENGTHS)])}


def plot(results, path):
    means = {
        name: {**runs[0], **{key: np.mean([run[key] for run in runs], axis=0) for key in ("needles", "lines")}}
        for name, runs in results.items()
    }
    plot_needles(means, path)


def main():
    cli.parse(__doc__)
    documents = [document for document in market.documents("general", 0, per_language=3000) if document["lang"] == "en"]
    held = [document for document in market.documents("general", 0, "test", per_language=100) if document["lang"] == "en"]
    tokenizer = train_tokenizer(documents, CONFIGS["tiny"].vocab_size)
    tokenised, runs = Tokenised(documents, tokenizer), finished("long_context")
    for seed in range(len(runs), SEEDS):
        runs.append(one_seed(tokenised, tokenizer, held, seed))
        for name, figures in runs[-1].items():
            by_length = np.mean(figures["needles"], axis=1)
            print(f"seed {seed}, {name}: bits per byte {figures['bits']:.4f}; needles", *(f"{value:.2f}" for value in by_length),
                  "; lines", *(f"{value:.2f}" for value in figures["lines"]), flush=True)  # fmt: skip
        keep_finished("long_context", runs)
    results = {name: [run[name] for run in runs] for name in runs[0]}
    keep("long_context", results)
    plot(results, os.path.join(RESULTS, "long_context.png"))


if __name__ == "__main__":
    cli.run(main)
