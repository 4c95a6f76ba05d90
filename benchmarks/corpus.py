"""Bits per byte on held-out text of your own corpus, per language, beside `xz -9` of the same text.

    python tokenizer.py --data CORPUS --run runs/corpus
    python train.py --data CORPUS --run runs/corpus --stage general --steps N
    python -m benchmarks.corpus --data CORPUS --run runs/corpus

The held-out text is every twentieth document by hash (data/reader.py). xz sees all of it at once and needs no
model; ours has read the training text. Writes corpus.json in the run folder.
"""

import json
import lzma
import os
from collections import defaultdict

import cli
from checkpoint import latest_stage, load_latest
from data import reader
from evaluate import bits_per_byte
from generate import load_for_inference
from report import table


def main():
    args = cli.parse(__doc__, "data", "run", "device", "seed")
    if args.data is None:
        raise cli.InputError("--data is needed: a folder of .txt/.jsonl files, as for tokenizer.py and train.py")
    model, tokenizer = load_for_inference(args.run, cli.pick_device(args.device))
    documents = list(reader.documents(args.data, "general", args.seed, "test"))
    texts = defaultdict(list)
    for document in documents:
        texts[document["lang"] or "?"].append(document["text"])
    ours, result = bits_per_byte(model, tokenizer, documents), {}
    for lang, bpb in ours.items():
        raw = "\n".join(texts[lang]).encode()
        tokens = sum(len(tokenizer.encode(text)) for text in texts[lang])
        xz = 8 * len(lzma.compress(raw, preset=9)) / len(raw)
        result[lang] = {"bytes": len(raw), "bytes_per_token": len(raw) / tokens, "compass": bpb, "xz": xz}
    rows = [[lang, f"{r['bytes']:,}", *(f"{r[k]:.2f}" for k in ("bytes_per_token", "compass", "xz"))] for lang, r in result.items()]
    print(table(rows, ["language", "held-out bytes", "bytes per token", "Compass, bits per byte", "xz -9, bits per byte"]))
    stage = latest_stage(args.run)
    content = {"stage": stage, "step": load_latest(args.run, stage)["step"], "seed": args.seed, "by_language": result}
    cli.write_atomically(os.path.join(args.run, "corpus.json"), json.dumps(content, indent=1).encode())


if __name__ == "__main__":
    cli.run(main)
