"""Quality of a document as one number, and resampling by it (v2 §2.1.1).

The classifier is a logistic regression over nine measurements that mean the same in every language, so that its weights can be
read: data/quality.json. The shipped judge was trained on real text in 17 languages and our marketplace against the same damaged
(`damage`) and knows no more than that; train your own on what you call good and bad. Resampling then keeps a document
`quality × occurrences` times (its cluster's size before duplicates went), at most MOST times: what many sites found worth
repeating is seen more often, what is poor more rarely. The fraction is decided by a hash of the text.

    python -m data.chain --step quality --data corpus/3-filter --out corpus/4-quality
    python -m data.chain --step resample --data corpus/5-dedup --out corpus/6-resample
    python -m data.quality --good books --bad crawl      # writes data/quality.json; without --bad against the books damaged
"""

import functools
import json
import math
import os
import random
import re
import zlib
from collections import Counter

import numpy as np

import cli
from cli import InputError
from data import market
from data.extract import documents_of, files_of, write_json
from data.filters import WORD

PATH = os.path.join(os.path.dirname(__file__), "quality.json")
MOST = 4  # copies of a document after resampling
FEATURES = (
    "letters", "digits", "capitals", "distinct words", "repeated 3-grams", "log10 of words", "sentence ends per word",
    "log10 of characters a line", "bytes after zlib",
)  # fmt: skip


def measure(text):
    """(9,) float64, in the order of FEATURES: shares of the visible characters or words unless a unit is named."""
    visible = re.sub(r"\s", "", text) or "?"
    words = WORD.findall(text.casefold()) or ["?"]
    lines = [line for line in text.split("\n") if line.strip()] or ["?"]
    grams = Counter(zip(words, words[1:], words[2:], strict=False))
    raw = text.encode()[:20_000] or b"?"
    return np.array([
        sum(c.isalpha() or "\u0e31" <= c <= "\u0e4e" for c in visible) / len(visible),
        sum(c.isdigit() for c in visible) / len(visible),
        sum(c.isupper() for c in visible) / len(visible),
        len(set(words[:200])) / len(words[:200]),
        1 - len(grams) / max(1, grams.total()),
        math.log10(len(words)),
        len(re.findall(r"[.!?。！？](?:\s|$)|[。！？]", text)) / len(words),
        math.log10(len(visible) / len(lines)),
        min(1.0, len(zlib.compress(raw)) / len(raw)),
    ])  # fmt: skip


def train(good, bad, steps=2000):
    """Logistic regression by gradient descent on two lists of texts; returns {"mean", "scale", "weights", "bias"}."""
    x_NF = np.array([measure(text) for text in (*good, *bad)])
    y_N = np.array([1.0] * len(good) + [0.0] * len(bad))
    share_N = np.where(y_N == 1, 0.5 / len(good), 0.5 / len(bad))  # both classes weigh the same
    mean_F, scale_F = x_NF.mean(axis=0), x_NF.std(axis=0) + 1e-6
    z_NF = (x_NF - mean_F) / scale_F
    w_F, bias = np.zeros(len(FEATURES)), 0.0
    for _ in range(steps):
        error_N = (1 / (1 + np.exp(-(z_NF @ w_F + bias))) - y_N) * share_N
        w_F -= 2.0 * (error_N @ z_NF + 1e-3 * w_F)
        bias -= 2.0 * error_N.sum()
    return {"mean": mean_F.tolist(), "scale": scale_F.tolist(), "weights": w_F.tolist(), "bias": float(bias)}


@functools.cache
def load(path=PATH):
    with open(path, encoding="utf-8") as file:
        return {name: np.array(value) for name, value in json.load(file).items() if name != "features"}


def quality(text, judge=None):
    """Score of a text in 0..1; judge: what `train` returns, default the shipped one."""
    judge = judge or load()
    z_F = (measure(text) - judge["mean"]) / judge["scale"]
    return float(1 / (1 + np.exp(-np.clip(z_F @ judge["weights"] + judge["bias"], -50, 50))))


def step(documents, counts, source):
    """The quality step: set "quality"; nothing is removed."""
    for document in documents:
        score = quality(document["text"])
        counts[f"quality from {min(4, math.floor(score * 5)) / 5:.1f}"] += 1
        yield {**document, "quality": round(score, 4)}


def copies(document):
    """How often resampling keeps a document: quality × occurrences, at most MOST; the fraction by a hash of the text."""
    expected = min(MOST, document.get("quality", 1.0) * document.get("occurrences", 1))
    whole = math.floor(expected)
    return whole + (zlib.crc32(document["text"].encode()) / 2**32 < expected - whole)


def resample(documents, counts, source):
    """The resample step."""
    for document in documents:
        times = copies(document)
        if times == 0:
            counts["removed: resampled away"] += 1
        counts["copies added"] += max(0, times - 1)
        for _ in range(times):
            yield document


def damage(text, rng):
    """What a judge should dislike, made of a good text: words in disorder, symbols, repetition, scraps, links, broken encoding."""
    words, kind = text.split(" ") if " " in text else list(text), rng.randrange(7)
    if kind == 0:
        return " ".join(rng.sample(words, len(words)))
    if kind == 1:
        return " ".join(word + rng.choice((" ", " | ", " # ", " 404 ", " ★ ")) for word in words)
    if kind == 2:
        return "\n".join([" ".join(words[:12])] * 15)
    if kind == 3:
        return "\n".join(" ".join(words[i : i + 2]) for i in range(0, 40, 2))
    if kind == 4:
        return text[: rng.randint(2, 30)]
    if kind == 5:
        return " ".join(f"{word} https://{rng.randrange(10**6)}.example/{rng.randrange(10**6)}" for word in words[:40])
    return text.encode().decode("latin-1")


def texts_of(folder):
    return [document["text"] for path in files_of(folder).values() for document in documents_of(path) if document["text"].strip()]


def main():
    args = cli.parse(
        __doc__, "seed",
        good=dict(required=True, help="folder of good documents"),
        bad=dict(help="folder of bad documents (default: the good ones, damaged)"),
    )  # fmt: skip
    rng = random.Random(args.seed)
    good = texts_of(args.good)
    if not good:
        raise InputError(f"--good {args.good}: all documents are empty")
    good = [text[:4000] for text in rng.sample(good, min(len(good), 20_000))]
    good += [document["text"] for document in market.documents("general", args.seed, per_language=500)]
    good += [market.shop_document(lang, rng, "train", rng.randint(3, 8)) for lang in market.LANGUAGES for _ in range(300)]
    bad = texts_of(args.bad) if args.bad else [damage(text, rng) for text in good]
    if not bad:
        raise InputError(f"--bad {args.bad}: all documents are empty")
    judge = train(good, bad)
    write_json(PATH, {"features": FEATURES, **judge})
    for name, weight in zip(FEATURES, judge["weights"], strict=True):
        print(f"{name:>28} {weight:+.2f}")


if __name__ == "__main__":
    cli.run(main)
