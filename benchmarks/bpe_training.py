"""Wall time and peak memory of training a BPE vocabulary, ours (pure Python) beside C++ and Rust trainers, one after the other.

Each trainer runs in a process of its own on the same texts (the eight main languages of a corpus without its held-out part), with
two threads where it has any; ours has one.

    pip install ".[bench]" && python -m benchmarks.bpe_training --data corpus        # about 3 minutes
"""

import json
import os
import subprocess
import sys
import time

import cli
from benchmarks import keep
from benchmarks.vocabulary import split_corpus
from report import table
from tokenizer import MAIN, PATTERN, train_bpe

TRAINERS = ("ours", "sentencepiece", "tokenizers", "rustbpe")


def train(name, texts, size):
    """Train with one library; returns the number of tokens."""
    if name == "ours":
        return len(train_bpe(texts, size))
    if name == "sentencepiece":
        import sentencepiece

        lines = (line for text in texts for line in text.split("\n") if line.strip())
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=open(os.devnull, "wb"), vocab_size=size, model_type="bpe", byte_fallback=True,
            character_coverage=0.9995, num_threads=2, minloglevel=2, max_sentence_length=100_000, split_digits=True,
            normalization_rule_name="identity",
        )  # fmt: skip
        return size
    if name == "tokenizers":
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

        model = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
        model.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        model.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, show_progress=False, initial_alphabet=alphabet))
        return model.get_vocab_size()
    import rustbpe

    model = rustbpe.Tokenizer()
    model.train_from_iterator(iter(texts), size, pattern=PATTERN)
    return len(model.get_mergeable_ranks())


def tables(results):
    header = [f"{results['ours']['tokens'] / 1000:.0f}k tokens from {results['ours']['MB']} MB", "seconds", "peak memory, GB"]
    return {"trainers": table([[name, r["seconds"], f"{r['peak_GB']:.2f}"] for name, r in results.items()], header)}


def main():
    args = cli.parse(
        __doc__,
        data=dict(required=True, help="folder of <lang>.jsonl files"),
        size=dict(type=int, default=150_000, help="tokens to train"),
        only=dict(choices=TRAINERS, help="train with one library in this process and print one JSON line"),
    )
    if args.only:
        import resource

        texts = [text for lang in MAIN for text in split_corpus(args.data)[0][lang]]
        began = time.perf_counter()
        tokens = train(args.only, texts, args.size)
        seconds, peak = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        size = sum(len(text.encode()) for text in texts) / 1e6
        print(json.dumps({"tokens": tokens, "seconds": round(seconds, 1), "peak_GB": round(peak, 2), "MB": round(size, 1)}))
        return
    results = {}
    for name in TRAINERS:
        command = [sys.executable, "-m", "benchmarks.bpe_training", "--data", args.data, "--size", str(args.size), "--only", name]
        done = subprocess.run(command, env={**os.environ, "RAYON_NUM_THREADS": "2"}, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(done.returncode)  # it has said why
        results[name] = json.loads(done.stdout.strip().split("\n")[-1])
        print(name, results[name], flush=True)
    ratio = results["ours"]["seconds"] / results["sentencepiece"]["seconds"]
    print(f"ours takes {ratio:.1f} times SentencePiece's time")
    keep("bpe_training", results)


if __name__ == "__main__":
    cli.run(main)
