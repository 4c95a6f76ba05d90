"""What a mixture of experts saves in decoding, against a dense model of equal loss (v2 Fig. 15).

`tiny` and siblings whose layers have one feed-forward of a given width train alike, three seeds of initialisation and data order.
Bits per byte, on new documents in training's templates and on held-out templates, say which width is `tiny`'s equal; then all decode 1
to 256 requests at once with a quarter of the report's 1024 tokens in and 256 out, arms taking turns. A dense layer trains as a mixture
of one expert, which computes the same, and decodes as the SwiGLU it is. Finished runs are kept in benchmarks/results/dense.jsonl and
not repeated.

    python -m benchmarks.dense      # 15 runs, about 40 minutes on two cores
"""

import json
import os
import statistics
from collections import defaultdict
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import torch

import cli
from benchmarks import RESULTS, finished, keep, keep_finished
from benchmarks.generation import endless_tokenizer, served
from benchmarks.tuning import general_model
from compass import CONFIGS, Compass, count_parameters
from data import market
from evaluate import bits_per_byte
from moe import SwiGLU
from report import save, table
from tokenizer import train as train_tokenizer
from train import Tokenised

SEEDS, STEPS, ROUNDS = 3, 600, 3
TINY = "tiny, 16 experts of 64, top-4 + 2 shared"
CONFIG_OF = {TINY: CONFIGS["tiny"]} | {
    f"dense, {width}": replace(CONFIGS["tiny"], n_experts=1, top_k=1, n_shared=0, expert_dim=width, aux_weight=0.0, z_weight=0.0)
    for width in (192, 384, 768, 1152)  # 384 are as many as `tiny` uses for a token, 1152 as it has
}
HELD = {"new documents": (1, "train"), "held-out templates": (0, "test")}  # what bits per byte are measured on
AT_ONCE = (1, 4, 16, 64, 256)


def run(config, tokenised, tokenizer, held, seed):
    """{documents: bits per byte} of one trained arm."""
    model = general_model(config, tokenised, STEPS, seed)
    with torch.inference_mode():
        return {name: statistics.mean(bits_per_byte(model, tokenizer, documents).values()) for name, documents in held.items()}


def decoder(config):
    """A random model of the shape, dense layers without a router."""
    torch.manual_seed(0)
    model = Compass(replace(config, max_seq_len=512)).eval()
    if config.n_experts == 1:
        for block in model.blocks:
            block.feed_forward = SwiGLU(config.dim, config.expert_dim)
    return model


def speeds():
    """{arm: {requests at once: tokens/s}}, the median of ROUNDS after one that does not count."""
    models, tokenizer, seen = {name: decoder(config) for name, config in CONFIG_OF.items()}, endless_tokenizer(4096), defaultdict(list)
    for at_once in AT_ONCE:
        for turn in range(1 + ROUNDS):
            for name, model in models.items():
                speed = served(model, tokenizer, at_once, 256, 64)["tokens/s"]
                if turn:
                    seen[name, at_once].append(speed)
    return {name: {at_once: statistics.median(seen[name, at_once]) for at_once in AT_ONCE} for name in models}


def plot(results, path):
    """Loss by width, and throughput by concurrency."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    dense = {name: bits for name, bits in results["bits"].items() if name != TINY}
    widths = [int(name.split()[-1]) for name in dense]
    for color, documents in zip(("tab:blue", "tab:orange"), HELD, strict=True):
        values = np.array([bits[documents] for bits in dense.values()])
        left.errorbar(widths, values.mean(1), values.std(1, ddof=1), fmt="o-", capsize=3, color=color, label=f"dense, {documents}")
        left.axhline(np.mean(results["bits"][TINY][documents]), color=color, linestyle="--", label=f"tiny, {documents}")
    left.set(xlabel="width of the dense feed-forward", ylabel="bits per byte", title=f"{STEPS} steps, three seeds")
    for name, rates in results["tokens/s"].items():
        right.plot([int(n) for n in rates], list(rates.values()), "s--" if name == TINY else "o-", label=name)
    right.set(xlabel="requests at once, 256 in, 64 out", ylabel="tokens/s, prefill included", title="throughput", ylim=(0, None))
    right.set_xscale("log", base=2)
    right.set_xticks(AT_ONCE, AT_ONCE)
    for axis in (left, right):
        axis.grid(alpha=0.4)
        axis.legend(fontsize=8)
    save(figure, path)


def tables(results):
    bits, rows, speed = results["bits"], [], []
    for name, config in CONFIG_OF.items():
        cells = []
        for documents in HELD:
            mine = np.array(bits[name][documents])
            change = mine - bits[TINY][documents]
            against = "" if name == TINY else f" ({change.mean():+.3f} ± {change.std(ddof=1):.3f})"
            cells.append(f"{mine.mean():.3f} ± {mine.std(ddof=1):.3f}{against}")
        rows.append([name, *(f"{n / 1e6:.2f}M" for n in count_parameters(config)), *cells])
        rates = results["tokens/s"]
        speed.append([name, *(f"{rate:,.0f} ({rate / rates[TINY][n]:.2f} ×)" for n, rate in rates[name].items())])
    return {
        "bits": table(rows, ["", "parameters", "active", *(f"bits per byte, {documents}" for documents in HELD)]),
        "speed": table(speed, ["tokens/s, requests at once", *map(str, AT_ONCE)]),
    }


def main():
    cli.parse(__doc__)
    documents = list(market.documents("general", 0))
    held = {name: list(market.documents("general", *which, per_language=200)) for name, which in HELD.items()}
    tokenizer, runs = train_tokenizer(documents, CONFIGS["tiny"].vocab_size), finished("dense")
    tokenised = Tokenised(documents, tokenizer)
    for name, config in CONFIG_OF.items():
        for seed in range(SEEDS):
            if not any((made["arm"], made["seed"]) == (name, seed) for made in runs):
                runs.append({"arm": name, "seed": seed, **run(config, tokenised, tokenizer, held, seed)})
                print(json.dumps(runs[-1]), flush=True)
                keep_finished("dense", runs)
    bits = {name: {key: [made[key] for made in runs if made["arm"] == name] for key in HELD} for name in CONFIG_OF}
    results = keep("dense", {"bits": bits, "tokens/s": speeds()})
    plot(results, os.path.join(RESULTS, "dense.png"))
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    cli.run(main)
