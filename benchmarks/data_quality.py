"""Does cleaning pay? Validation loss of `tiny` after the same number of steps on a dirty corpus and on what the chain makes of it.

Real text in the eight main languages plays the clean corpus. Dirt is planted: a fifth of the documents occur two to nine times,
mostly with a line changed, and for every fifth a damaged one comes along (words shuffled, symbols, a phrase repeated). Every arm
trains on its version for the same steps; bits per byte are measured on clean held-out documents. Three seeds change
initialisation and data order; differences to the dirty corpus are paired by seed. The judge of quality is trained on other
documents, clean and damaged.

    python -m benchmarks.data_quality --data corpus        # 8 arms x 3 seeds, about 35 minutes on two cores
"""

import hashlib
import json
import random
from collections import Counter

import numpy as np

import cli
from benchmarks import keep
from benchmarks.tuning import general_model
from compass import CONFIGS
from data import dedup, filters, quality
from data.reader import held_out, read_folder
from evaluate import bits_per_byte
from report import table
from tokenizer import MAIN, Tokenizer, train_bpe
from train import Tokenised

STEPS, BYTES = 300, 150_000  # training steps; bytes of clean text a language


def clean_texts(folder):
    """Training, judge's and held-out documents: lists of {"text", "lang"}, about BYTES of training text a language."""
    train, judged, held = [], [], []
    documents = [d for d in read_folder(folder) if d["lang"] in MAIN]
    random.Random(0).shuffle(documents)
    for lang in MAIN:
        size = {"train": 0, "held": 0, "judged": 0}
        for document in (d for d in documents if d["lang"] == lang and len(d["text"]) > 200):
            text = {**document, "text": document["text"][:4000]}
            part, most, target = (
                ("held", BYTES / 6, held) if held_out(document["text"])
                else ("judged", BYTES / 6, judged) if size["judged"] < BYTES / 6
                else ("train", BYTES, train)
            )  # fmt: skip
            if size[part] < most:
                size[part] += len(text["text"].encode())
                target.append(text)
    return train, judged, held


def dirty(documents, seed=0):
    """Each document and what a crawl makes of it."""
    rng, made = random.Random(seed), []
    for document in documents:
        made.append(document)
        if rng.random() < 0.2:
            for _ in range(rng.randint(1, 8)):
                made.append({**document, "text": document["text"] + ("" if rng.random() < 0.3 else f"\n{rng.randint(0, 9999)}")})
        if rng.random() < 0.2:
            made.append({**document, "text": quality.damage(rng.choice(documents)["text"], rng)})
    rng.shuffle(made)
    return made


def deduplicated(documents, keep, threshold=dedup.THRESHOLD):
    texts = [hashlib.blake2b(d["text"].encode()).digest() for d in documents]
    signatures_NP = np.array([dedup.signature(d["text"]) for d in documents])
    verdicts = dedup.verdicts(texts, signatures_NP, [d["quality"] for d in documents], keep, threshold)
    return [{**d, "occurrences": int(v)} for d, v in zip(documents, verdicts, strict=True) if v > 0]


def arms(train, judged):
    """{name: documents}."""
    rng = random.Random(1)
    judge = quality.train([d["text"] for d in judged], [quality.damage(d["text"], rng) for d in judged])
    crawl = [{**d, "quality": quality.quality(d["text"], judge)} for d in dirty(train)]
    good = [d for d in filters.step([dict(d, kind="prose") for d in crawl], Counter(), "") if d["quality"] > 0.5]
    once = deduplicated(good, 1)
    return {
        "dirty": crawl,
        "dedup, J ≥ 0.8, keep 1": deduplicated(crawl, 1),
        "dedup, J ≥ 0.5, keep 1": deduplicated(crawl, 1, 0.5),
        "dedup, J ≥ 0.8, keep 3 good": deduplicated(crawl, 3),
        "dedup, J ≥ 0.5, keep 3 good": deduplicated(crawl, 3, 0.5),
        "filters and quality": good,
        "filters, quality, dedup": once,
        "filters, quality, dedup, resample": [d for document in once for d in [document] * quality.copies(document)],
    }  # fmt: skip


def train_and_measure(documents, tokenizer, held, seed):
    """Mean over the languages of bits per byte on the held-out documents."""
    model = general_model(CONFIGS["tiny"], Tokenised(documents, tokenizer), STEPS, seed)
    return float(np.mean(list(bits_per_byte(model, tokenizer, held).values())))


def tables(results):
    rows = [
        [name, f"{r['MB']:.2f}", ", ".join(f"{bits:.3f}" for bits in r["bits"]), f"{r['difference']:+.3f} ± {r['spread']:.3f}"]
        for name, r in results.items()
    ]
    return {"arms": table(rows, [f"{STEPS} steps of `tiny` on", "MB", "bits per byte, three seeds", "against dirty, paired"])}


def main():
    args = cli.parse(__doc__, data=dict(required=True, help="folder of <lang>.jsonl files"))
    train, judged, held = clean_texts(args.data)
    tokenizer = Tokenizer(train_bpe([d["text"] for d in judged + train], CONFIGS["tiny"].vocab_size - 7))
    versions, results = arms(train, judged), {}
    print({name: len(documents) for name, documents in versions.items()}, flush=True)
    for name, documents in versions.items():
        bits = [train_and_measure(documents, tokenizer, held, seed) for seed in range(3)]
        gain = np.array(bits) - np.array(results.get("dirty", {"bits": bits})["bits"])
        results[name] = {
            "documents": len(documents), "MB": sum(len(d["text"].encode()) for d in documents) / 1e6, "bits": bits,
            "difference": float(gain.mean()), "spread": float(gain.std(ddof=1)),
        }  # fmt: skip
        print(name, json.dumps(results[name]), flush=True)
    keep("data_quality", results)


if __name__ == "__main__":
    cli.run(main)
