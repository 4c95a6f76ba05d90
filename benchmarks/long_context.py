"""Does the long stage with a larger RoPE base (ABF) make long texts usable, and what does it cost on short ones? (v2 §2.3.)

One model learns to find parcels among product pages in texts of 256 tokens, beside plain documents, and goes on for 2.5M tokens in
three ways: on texts of 256 tokens, on texts of 1024 tokens with the RoPE base unchanged, and on those with ABF (base 1e6). Here the
parcels lie among documents of all kinds, half of them with their words shuffled: who has seen them among training's pages alone may
find them nowhere else. Each is asked for a parcel hidden at five depths among pages in the held-out templates, and for one line of
many, in texts from 128 to 2048 tokens; and its bits per byte on short documents are measured, new ones in training's templates and
ones in the held-out templates, which no model has seen. English only, because retrieval from scratch takes long; the cities to be
found have weight 1, plain text 0.03, and 0.3 once finding is learnt. Three seeds of initialisation and data; finished ones are kept
in benchmarks/results/long_context.jsonl.

    python -m benchmarks.long_context      # about three hours with one thread
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

SEEDS, DOCUMENTS, STEPS, LONG = 3, 12_000, 5000, dict(steps=600, peak=1e-3, final=1e-4)
LENGTHS = (128, 256, 512, 1024, 1536, 2048)
SHORT = {"new documents": (1, "train", 300), "held-out templates": (0, "test", 100)}  # what bits per byte are measured on


def surrounding(rng, documents):
    """A text for lines to lie among: a product page or, of the documents, any, half of the time with its words shuffled."""
    if documents is None:
        return market.page(market.draw_product(rng, "train"), "en", rng, "train")
    text = rng.choice(documents)["text"]
    return text if rng.random() < 0.5 else " ".join(rng.sample(words := text.split(), len(words)))


def retrieval_row(tokenizer, rng, length, documents=None):
    """[(ids, mask), …] filling one row: one to four lines among texts, then the lines again; mainly their cities are to be predicted."""
    row, room = [], length
    while room > 40:
        entries = rng.randint(1, 4)
        size = rng.randint(40, room)
        lines = market.ledger_lines("en", rng, entries)
        body, used = list(lines), 2 * sum(len(tokenizer.encode(line)) + 2 for line in lines)
        while used < size:
            body.append(surrounding(rng, documents))
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


def train_on(model, tokenised, tokenizer, length, rows, schedule, seed, weight, documents=None):
    """A quarter of the rows are plain documents, whose tokens have that weight, the others exercises in finding."""
    plain, quarter = TokenRows(tokenised, length, seed), rows // 4

    def batches(step):
        rng = random.Random(f"{seed}-{length}-{step}")
        batch = [[(ids, weight * mask) for ids, mask in plain.row(i)] for i in range(step * quarter, (step + 1) * quarter)]
        batch += [retrieval_row(tokenizer, rng, length, documents) for _ in range(rows - quarter)]
        return [assemble(batch, length)]

    return train(model, batches, language_model_loss, schedule, f"{length} tokens, base {model.config.rope_base:g}")


def english(seed, split, n):
    return [document for document in market.documents("general", seed, split, n) if document["lang"] == "en"]


def measure(model, tokenizer, seed):
    bits = {name: bits_per_byte(model, tokenizer, english(*which))["en"] for name, which in SHORT.items()}
    return {**retrieval(model, tokenizer, LENGTHS, seed=seed, n=20, langs=("en",)), "bits": bits}


WAYS = {"short texts, base 1e4": (256, 16, 1e4), "long texts, base 1e4": (1024, 4, 1e4), "long texts, base 1e6 (ABF)": (1024, 4, 1e6)}


def one_seed(documents, tokenised, tokenizer, seed):
    """{way of going on: figures}, and those of the model that all start from."""
    torch.manual_seed(seed)
    general, long = (RECIPES["tiny"][stage] for stage in ("general", "long"))
    short, figures = Compass(CONFIGS["tiny"]), {}
    train_on(short, tokenised, tokenizer, general.seq_len, general.rows, general.schedule._replace(steps=STEPS), seed, 0.03)
    figures["before"] = measure(short, tokenizer, seed)
    for name, (length, rows, base) in WAYS.items():
        model = Compass(dataclasses.replace(short.config, rope_base=base))
        model.load_state_dict(short.state_dict())
        train_on(model, tokenised, tokenizer, length, rows, long.schedule._replace(**LONG), seed + SEEDS, 0.3, documents)
        figures[name] = measure(model, tokenizer, seed)
    return figures


def tables(results):
    def bits(name, documents):
        """The mean over seeds, and the mean and spread of the change against the model that the same seed began from."""
        after, before = (np.array([run["bits"][documents] for run in results[which]]) for which in (name, "before"))
        change = 100 * (after / before - 1)
        return f"{after.mean():.3f} ({change.mean():+.1f} ± {change.std(ddof=1):.1f} %)" if name != "before" else f"{after.mean():.3f}"

    rows = []
    for name, runs in results.items():
        needles, lines = (100 * np.mean([run[key] for run in runs], axis=0) for key in ("needles", "lines"))
        found = (f"{n:.0f}, {line:.0f}" for n, line in zip(needles.mean(1), lines, strict=True))
        rows.append([name, *(bits(name, documents) for documents in SHORT), *found])
    header = ["needles, lines found, %", *(f"bits per byte, {documents}" for documents in SHORT)]
    return {"found": table(rows, [*header, *(f"{length} tokens" for length in LENGTHS)])}


def plot(results, path):
    means = {
        name: {**runs[0], **{key: np.mean([run[key] for run in runs], axis=0) for key in ("needles", "lines")}}
        for name, runs in results.items()
    }
    plot_needles(means, path)


def main():
    cli.parse(__doc__)
    documents = english(0, "train", DOCUMENTS)
    tokenizer = train_tokenizer(documents[: DOCUMENTS // 4], CONFIGS["tiny"].vocab_size)
    tokenised, runs = Tokenised(documents, tokenizer), finished("long_context")
    for seed in range(len(runs), SEEDS):
        runs.append(one_seed(documents, tokenised, tokenizer, seed))
        for name, figures in runs[-1].items():
            by_length = np.mean(figures["needles"], axis=1)
            print(f"seed {seed}, {name}: bits per byte", *(f"{value:.4f}" for value in figures["bits"].values()),
                  "; needles", *(f"{value:.2f}" for value in by_length), flush=True)  # fmt: skip
        keep_finished("long_context", runs)
    results = {name: [run[name] for run in runs] for name in runs[0]}
    keep("long_context", results)
    plot(results, os.path.join(RESULTS, "long_context.png"))


if __name__ == "__main__":
    cli.run(main)
