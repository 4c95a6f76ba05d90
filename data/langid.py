"""Language of every sentence, by a linear model over hashed n-grams and words (v2 §2.1.1: sentence-level identification).

A sentence becomes the buckets of its byte n-grams of 2, 3 and 4 bytes (UTF-8, lower case, letters only) and of its words; the model is one
table W (buckets, languages), and the softmax of the mean of a sentence's rows is its distribution over languages. The shipped table
data/langid.npz knows 17 languages and was trained on openly licensed text and our own marketplace only. Such text is rare in Malay, most of
which it takes for Indonesian: train your own table on a folder of <lang>.jsonl files where the difference matters.

    python -m data.langid --text "Barangnya sudah sampai, terima kasih kak"
    python -m data.langid --train CORPUS            # writes data/langid.npz anew
"""

import functools
import os
import random
import re
import zlib
from collections import Counter, defaultdict

import numpy as np
from tqdm import tqdm

import cli
from cli import InputError
from data import market
from data.filters import kind_of
from data.reader import CODES, held_out, read_folder

BUCKETS, SIZES = 1 << 16, (2, 3, 4)
SISTERS = {"id", "ms"}  # Indonesian and Malay share most of their words
PATH = os.path.join(os.path.dirname(__file__), "langid.npz")
WORDS = re.compile(r"[^\W\d_][^\W\d_\u0300-\u036f\u0e31-\u0e4e]*|[\u0e00-\u0e7f]+")
SENTENCES = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n+")


def sentences(text):
    """Non-empty sentences of a text: cut after . ! ? and their full-width forms, and at line breaks."""
    return [piece.strip() for piece in SENTENCES.split(text) if piece.strip()]


def features(sentence):
    """Buckets of a sentence's byte n-grams and words, (n,) int64; empty without a letter."""
    words = WORDS.findall(sentence.lower())
    if not words:
        return np.zeros(0, np.int64)
    codes = np.frombuffer(f" {' '.join(words)} ".encode(), np.uint8).astype(np.uint64)
    buckets = [np.array([zlib.crc32(word.encode()) % BUCKETS for word in words], np.int64)]
    for size in SIZES:
        rolled = np.zeros(len(codes) - min(size, len(codes)) + 1, np.uint64)
        for k in range(min(size, len(codes))):  # FNV: xor a byte in, multiply by a prime, wrap at 2^64
            rolled = (rolled ^ codes[k : k + len(rolled)]) * np.uint64(1099511628211) + np.uint64(size)
        buckets.append(((rolled >> np.uint64(20)) % np.uint64(BUCKETS)).astype(np.int64))
    return np.concatenate(buckets)


def train(documents, steps=4000, batch=256, seed=0):
    """Fit the table on documents {"text", "lang"} by softmax regression: (languages, W (BUCKETS, L) int8, scale).

    Every language is drawn equally often, however little text it has; sentences under 10 characters are left out.
    """
    import torch
    import torch.nn.functional as F

    rng, pool = random.Random(seed), defaultdict(list)
    for document in documents:
        if document["lang"]:
            pool[document["lang"]] += [s for s in sentences(document["text"]) if len(s) >= 10]
    languages = sorted(pool)
    known = [[buckets for s in pool[lang] if len(buckets := features(s))] for lang in languages]
    if bare := [lang for lang, sentences_of in zip(languages, known, strict=True) if not sentences_of]:
        raise InputError(f"no sentence of 10 characters or more in {', '.join(bare)}: leave that language out, or give more text")
    table = torch.nn.EmbeddingBag(BUCKETS, len(languages), mode="mean")
    torch.nn.init.zeros_(table.weight)
    optimizer = torch.optim.Adam(table.parameters(), lr=0.05)
    for step in tqdm(range(steps), desc="langid"):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
        label_B = rng.choices(range(len(languages)), k=batch)
        picked = [rng.choice(known[label]) for label in label_B]
        starts_B = torch.tensor([0, *map(len, picked[:-1])]).cumsum(0)
        logits_BL = table(torch.from_numpy(np.concatenate(picked)), starts_B)
        optimizer.zero_grad()
        F.cross_entropy(logits_BL, torch.tensor(label_B)).backward()
        optimizer.step()
    W_BL = table.weight.detach().numpy()
    scale = float(np.abs(W_BL).max()) / 127
    return languages, np.round(W_BL / scale).astype(np.int8), scale


@functools.cache
def model(path=PATH):
    """(languages, W (BUCKETS, L) float32) of a saved table."""
    with np.load(path) as saved:
        return saved["languages"].tolist(), saved["table"].astype(np.float32) * float(saved["scale"])


def identify(sentence):
    """(language, probability) of the likeliest language; (None, 0.0) without a letter."""
    languages, W_BL = model()
    buckets = features(sentence)
    if not len(buckets):
        return None, 0.0
    scores_L = W_BL[buckets].mean(axis=0)
    best = int(scores_L.argmax())
    return languages[best], float(1 / np.exp(scores_L - scores_L[best]).sum())


def document_language(text, least=0.6):
    """(language, share): the language of most characters among sentences of probability `least` or more, and its share of those."""
    size = Counter()
    for sentence in sentences(text):
        lang, probability = identify(sentence)
        if probability >= least:
            size[lang] += len(sentence)
    if not size:
        return None, 0.0
    (lang, most), total = size.most_common(1)[0], size.total()
    if lang in SISTERS:  # half of a Malay text may look Indonesian without being in two languages
        most = sum(size[sister] for sister in SISTERS)
    return lang, most / total


def step(documents, counts, source):
    """The langid step: set "lang"; drop what has no clear language, or two (share under 0.6); correct wrong labels and count them.

    Where a document says that it is Malay and the model says Indonesian, or the other way round, the document is believed.
    Code and sums pass: the words in them are not sentences.
    """
    for document in documents:
        if kind_of(document) != "prose":
            yield document if document.get("lang") in (None, *CODES) else {**document, "lang": None}  # "python", say
            continue
        lang, share = document_language(document["text"])
        if {lang, document.get("lang")} == SISTERS:
            lang = document["lang"]
        if lang is None:
            counts["removed: no clear language"] += 1
        elif share < 0.6:
            counts["removed: mixed languages"] += 1
        else:
            counts["relabelled"] += document.get("lang") not in (None, lang)
            yield {**document, "lang": lang}


def main():
    args = cli.parse(
        __doc__, "seed",
        text=dict(help="identify each sentence of this text"),
        train=dict(help="folder of <lang>.jsonl files to train the table on"),
    )  # fmt: skip
    if not args.train and not args.text:
        raise InputError("nothing to do: give --text or --train")
    if args.train:
        documents = [d for d in read_folder(args.train) if not held_out(d["text"])]
        documents += market.documents("general", args.seed, per_language=400)
        languages, table_BL, scale = train(documents, seed=args.seed)
        with open(PATH + ".part", "wb") as file:
            np.savez_compressed(file, languages=languages, table=table_BL, scale=scale)
        os.replace(PATH + ".part", PATH)
        print(f"{PATH}: {len(languages)} languages, {os.path.getsize(PATH) / 1e6:.2f} MB")
    for sentence in sentences(args.text or ""):
        print(*identify(sentence), sentence)


if __name__ == "__main__":
    cli.run(main)
