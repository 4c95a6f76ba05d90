"""Generation on a CPU, each figure beside its peer or its limit from the same run.

    peers        `tiny` without shared experts (transformers' are gated) against transformers' generate, same weights and settings, the
                 better of its experts implementations: 32 answers to one prompt, 32 prompts, one prompt; tasks of the evaluation, whose
                 prompts and answers differ in length. Ours also for one token an answer: what no faster decoding could save
    concurrency  1 to 256 requests at once with the report's shapes of prompt and answer (1200 in 200 out, 1024 in 256 out) at a quarter,
                 in FP32, int4 and FP8
    bandwidth    one row of two models of about 300M parameters: bytes of active weights a second beside those of a sum over 1.2 GB
    length       the time of a step early and late in a long answer, and the part of it that is attention
    mtp          tiny_v3 with and without its MTP block, three seeds at equal tokens: bits per byte, and what drafting then gives

Trained arms of mtp are kept in benchmarks/results/generation.jsonl and not repeated.

    python -m benchmarks.generation                    # all, about twenty minutes
    python -m benchmarks.generation --stage peers      # one part; the others keep their figures
"""

import json
import os
import random
import statistics
import time
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import torch

import cli
from benchmarks import RESULTS, best_peer, finished, keep, keep_finished, kept, quartiles, quartiles_of, ratios, shown, timed
from benchmarks.moe import twin
from benchmarks.quantization import LARGE, held, read_for_a_token, reloaded
from compass import CONFIGS, Compass, CompassConfig, count_parameters
from data import market
from data.tasks import tasks
from engine import Engine, Sampling
from evaluate import bits_per_byte
from generate import GREEDY
from kvcache import KVCache
from quantize import quantize_model
from report import save, table
from sft import chat_of
from tokenizer import Tokenizer, train_bpe
from tokenizer import train as train_tokenizer
from train import RECIPES, Tokenised, TokenRows, _train_step, language_model_loss, lr_at, make_optimizer

FREE = Sampling(temperature=1.0, top_k=0, top_p=1.0, repetition=1.0)
ROUNDS, TURNS, STEPS, SEEDS = 5, 3, 200, 3


def endless_tokenizer(vocab_size):
    """Nothing stops and nothing is decoded: every answer has as many tokens as it may."""
    tokenizer = Tokenizer(train_bpe(["a few words, so that the ids exist"] * 2, 300))
    tokenizer.special = {name: -1 for name in tokenizer.special}
    tokenizer.n_vocab, tokenizer.encoding = vocab_size, SimpleNamespace(decode_bytes=lambda ids: b"")
    return tokenizer


def evaluation_tasks():
    """[(prompt, tokens of the reference answer), …]: a task of each kind in each language, with its thought where it has one."""
    tokenizer, made = Tokenizer.load("checkpoints/tiny"), []
    for task in tasks("test", 0, 1):
        thinking = "think" in task
        prompt, _ = tokenizer.encode_chat(task["messages"], thinking)
        whole, _ = tokenizer.encode_chat(chat_of(task, thinking), thinking)
        made.append((prompt, len(whole) - len(prompt)))
    return made


def peers():
    """{case: {"seconds": {arm: quartiles}, "best peer", "ratio"}} of answers of a given length, 32 at once.

    transformers takes prompts of about one length together, pads them on the left, and goes on until the longest answer is done.
    """
    torch.manual_seed(0)
    model = Compass(replace(CONFIGS["tiny"], n_shared=0, max_seq_len=1024)).eval()
    tokenizer, theirs = endless_tokenizer(4096), twin(model).eval()
    theirs.set_attn_implementation("sdpa")  # eager attention was never faster (benchmarks.alignment_speed)

    def drawn(prompts, length):
        return [(prompt, 48) for prompt in torch.randint(4096, (prompts, length)).tolist()]

    def length_of(one):
        return len(one[0])

    def ours(asked, n):
        engine = Engine(model, tokenizer, 32, max(len(prompt) + new for prompt, new in asked))
        for prompt, new in sorted(asked, key=length_of):
            for sample in range(n):
                engine.submit(prompt, replace(FREE, max_tokens=new), sample)
        engine.run()

    def peer(experts, asked, n):
        theirs.set_experts_implementation(experts)
        asked = sorted(asked, key=length_of)
        for start in range(0, len(asked), 32):
            prompts, lengths = zip(*asked[start : start + 32], strict=True)
            width, new = max(map(len, prompts)), max(lengths)
            ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
            with torch.inference_mode():
                theirs.generate(
                    ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=n,
                    max_new_tokens=new, min_new_tokens=new, use_cache=True, pad_token_id=0,
                )  # fmt: skip

    every, results = evaluation_tasks(), {}
    for case, asked, n in (
        ("32 answers to one prompt of 128 tokens", drawn(1, 128), 32), ("32 answers to one prompt of 768 tokens", drawn(1, 768), 32),
        ("32 prompts of 128 tokens", drawn(32, 128), 1), ("32 prompts of 768 tokens", drawn(32, 768), 1),
        ("one prompt of 128 tokens", drawn(1, 128), 1),
        ("32 tasks of the evaluation", random.Random(0).sample(every, 32), 1), (f"all {len(every)}, 32 at once", every, 1),
    ):  # fmt: skip
        first = [(prompt, 1) for prompt, _ in asked]
        arms = {"ours": lambda asked=asked, n=n: ours(asked, n), "ours, first tokens": lambda asked=first, n=n: ours(asked, n)}
        arms |= {f"transformers, {e}": lambda e=e, asked=asked, n=n: peer(e, asked, n) for e in ("eager", "grouped_mm", "batched_mm")}
        seconds = timed(arms, ROUNDS)
        best = best_peer(seconds)
        results[case] = {"seconds": quartiles_of(seconds), "best peer": best, "ratio": ratios(seconds[best], seconds["ours"])}
        print(case, json.dumps(results[case]), flush=True)
    return results


def served(model, tokenizer, at_once, length, new):
    """Figures of so many requests at once, of `length` random tokens and `new` tokens of answer each."""
    engine, steps, busy = Engine(model, tokenizer, at_once, length + new), [], True
    for prompt in torch.randint(4096, (at_once, length)).tolist():
        engine.submit(prompt, Sampling(max_tokens=new))
    while busy:
        began = time.perf_counter()
        busy = engine.step()
        steps.append(time.perf_counter() - began)
    return {
        "tokens/s": at_once * new / sum(steps), "first token, s": steps[0], "later token, ms": 1e3 * statistics.median(steps[1:]),
        "cache, MB": engine.bytes / 1e6,
    }  # fmt: skip


def concurrency():
    """{"memory, MB": {method: weights}, shape: {method: {requests at once: {figure: quartiles of TURNS}}}} of the engine alone, random
    weights."""
    torch.manual_seed(0)
    model, tokenizer = Compass(replace(CONFIGS["tiny"], max_seq_len=512)).eval(), endless_tokenizer(4096)
    models, seen = {"FP32": model}, [torch.randint(4096, (8, 256))]
    models |= {name: reloaded(quantize_model(model, seen, name.lower().split()[0])) for name in ("AWQ int4", "RTN int4", "FP8")}
    results = {"memory, MB": {name: held(model) / 1e6 for name, model in models.items()}}
    for shape, length, new in (("300 in, 50 out", 300, 50), ("256 in, 64 out", 256, 64)):
        results[shape] = {name: {} for name in models}
        for at_once in (1, 4, 16, 64, 256):
            turns = [[served(model, tokenizer, at_once, length, new) for model in models.values()] for _ in range(TURNS)]
            for name, runs in zip(models, zip(*turns, strict=True), strict=True):
                results[shape][name][at_once] = {figure: quartiles([run[figure] for run in runs]) for figure in runs[0]}
                print(shape, name, at_once, json.dumps(results[shape][name][at_once]), flush=True)
    return results


def bandwidth():
    """{model: figures} of decoding one row of models too large for the caches: that of benchmarks.quantization, and one of fewer, wider
    matrices."""
    results, large = {}, torch.randn(300_000_000)
    for name, config in (("12 layers", LARGE), ("8 layers", CompassConfig(8, 1024, 16, 4, 64, 16, 4, 2, 512, 32_000, 256))):
        torch.manual_seed(0)
        model = Compass(config).eval()
        engine = Engine(model, endless_tokenizer(config.vocab_size), 1)
        engine.submit(list(range(16)), replace(GREEDY, max_tokens=200))
        engine.step()
        seconds, read = timed({"sum": large.sum, "step": engine.step}, 30), read_for_a_token(model)
        limit, ours = ([size / s for s in seconds[arm]] for arm, size in (("sum", large.nbytes), ("step", read)))
        results[name] = {
            "parameters": count_parameters(config)[0], "tokens/s": quartiles([1 / s for s in seconds["step"]]),
            "limit": quartiles(limit), "ours": quartiles(ours), "share": ratios(ours, limit),
        }  # fmt: skip
        print(name, json.dumps(results[name]), flush=True)
    return results


def length():
    """{"step", "attention": {tokens already there: quartiles of the milliseconds of 100 steps}} of 16 rows; attention, the reading of keys
    and values, may grow."""
    torch.manual_seed(0)
    model, tokenizer = Compass(replace(CONFIGS["tiny"], max_seq_len=2048)).eval(), endless_tokenizer(4096)
    engine, seconds, attend = Engine(model, tokenizer, 16, 2048), {"step": [], "attention": []}, KVCache.attend

    def timed_attend(*args):
        began = time.perf_counter()
        y_BHTC = attend(*args)
        seconds["attention"][-1] += time.perf_counter() - began
        return y_BHTC

    for i in range(16):
        engine.submit([i, 5], replace(FREE, max_tokens=2000))
    with mock.patch.object(KVCache, "attend", timed_attend):
        for _ in range(1990):
            seconds["attention"].append(0.0)
            began = time.perf_counter()
            engine.step()
            seconds["step"].append(time.perf_counter() - began)
    places = (100, 500, 1000, 1500, 1900)
    seconds["the rest"] = [step - attention for step, attention in zip(seconds["step"], seconds["attention"], strict=True)]
    results = {part: {f"{at}": quartiles([1e3 * s for s in spent[at - 50 : at + 50]]) for at in places} for part, spent in seconds.items()}
    print("ms a step by tokens of the answer", results)
    return results


def drafting(model, tokenizer, held):
    """Greedy answers of 96 tokens to the first 32 of held-out documents, one at a time, plain and drafting in turns."""
    prompts = [tokenizer.encode(document["text"])[:32] for document in held[::40]][:8]
    engines = {draft: Engine(model, tokenizer, 1, draft=draft) for draft in (False, True)}
    seconds, ids = {False: 0.0, True: 0.0}, {False: [], True: []}
    for turn in range(4):
        for prompt in prompts:
            for draft in (False, True) if turn % 2 else (True, False):
                request = engines[draft].submit(prompt, GREEDY)
                began = time.perf_counter()
                engines[draft].run()
                if turn:  # the first is for warming up
                    seconds[draft] += time.perf_counter() - began
                ids[draft].append(request.ids)
    assert ids[False] == ids[True]
    return {"accepted": engines[True].accepted / engines[True].drafted, "speed-up": seconds[False] / seconds[True]}


def mtp_run(depth, seed, tokenised, tokenizer, held):
    """Train one arm; its figures."""
    recipe = RECIPES["tiny_v3"]["general"]
    schedule = recipe.schedule._replace(steps=STEPS)
    torch.manual_seed(seed)
    model = Compass(replace(CONFIGS["tiny_v3"], mtp_depth=depth))
    batches = TokenRows(tokenised, recipe.seq_len, seed).batches(recipe.rows, recipe.micro_rows)
    optimizer, seconds = make_optimizer(model, schedule.beta2), []
    for step in range(STEPS):
        batch, began = batches(step), time.perf_counter()
        _train_step(model, optimizer, batch, language_model_loss, lr_at(step, schedule), torch.device("cpu"))
        seconds.append(time.perf_counter() - began)
    model.eval()
    bits = float(np.mean(list(bits_per_byte(model, tokenizer, held).values())))
    figures = {"threads": torch.get_num_threads(), "bits": bits, "ms": 1e3 * statistics.median(seconds)}
    return figures | (drafting(model, tokenizer, held) if depth else {})


def mtp():
    """The runs that the log lacks, then their summary."""
    documents = list(market.documents("general", 0, per_language=800))
    held = list(market.documents("general", 0, "test", per_language=40))
    tokenizer, runs = train_tokenizer(documents, CONFIGS["tiny_v3"].vocab_size), finished("generation")
    tokenised = Tokenised(documents, tokenizer)
    for seed in range(SEEDS):
        for depth in (1, 0):
            if not any((run["depth"], run["seed"]) == (depth, seed) for run in runs):
                runs.append({"depth": depth, "seed": seed, **mtp_run(depth, seed, tokenised, tokenizer, held)})
                print(json.dumps(runs[-1]), flush=True)
                keep_finished("generation", runs)
    runs.sort(key=lambda run: (run["depth"], run["seed"]))
    off, on = runs[:SEEDS], runs[SEEDS:]
    difference = [b["bits"] - a["bits"] for a, b in zip(off, on, strict=True)]
    results = {
        "bits per byte without": [run["bits"] for run in off], "with": [run["bits"] for run in on],
        "difference, mean and spread": [float(np.mean(difference)), float(np.std(difference, ddof=1))],
        "accepted": [run["accepted"] for run in on], "speed-up": [run["speed-up"] for run in on],
        "ms a training step, without and with": [statistics.median(run["ms"] for run in arm) for arm in (off, on)],
    }  # fmt: skip
    print(json.dumps(results, indent=1))
    return results


def plot(results, path):
    """Throughput by concurrency, and the time of a step by length."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for name, rows in results["concurrency"]["256 in, 64 out"].items():
        left.plot([int(n) for n in rows], [row["tokens/s"][1] for row in rows.values()], "o-", label=name)
    left.set(xlabel="requests at once, 256 in, 64 out", ylabel="tokens/s, prefill included", title="throughput of `tiny`", ylim=(0, None))
    left.set_xscale("log", base=2)
    left.set_xticks([int(n) for n in rows], rows)
    left.legend()
    for part, steps in results["length"].items():
        right.plot([int(at) for at in steps], [median for _, median, _ in steps.values()], "o-", label=part)
    right.set(xlabel="tokens of the answer", ylabel="ms a step of 16 rows", title="cost of a step", ylim=(0, None))
    right.legend()
    for axis in (left, right):
        axis.grid(alpha=0.4)
    save(figure, path)


def tables(results):
    def listed(values, digits, scale=1):
        return ", ".join(f"{scale * value:.{digits}f}" for value in values)

    peers, load, methods = [], [], []
    for case, found in results["peers"].items():
        seconds = (shown(found["seconds"][name], 3) for name in ("ours", "ours, first tokens", found["best peer"]))
        peers.append([case, *seconds, shown(found["ratio"], 1)])
    (_, memory), *shapes = results["concurrency"].items()
    for shape, by_method in shapes:
        for n, row in by_method["FP32"].items():
            rest = shown(row["first token, s"], 3), shown(row["later token, ms"], 1), f"{row['cache, MB'][1]:.1f}"
            load.append([shape, n, shown(row["tokens/s"]), *rest])
        for name, rows in by_method.items():
            methods.append([shape, name, f"{memory[name]:.1f}", *(shown(row["tokens/s"]) for row in rows.values())])
    length, mtp, rates = results["length"], results["mtp"], []
    for name, band in results["bandwidth"].items():
        cells = [shown(band["tokens/s"], 1), *(shown(band[which], 1, 1e-9) for which in ("ours", "limit")), shown(band["share"], scale=100)]
        rates.append([name, f"{band['parameters'] / 1e6:.0f}M", *cells])
    ms = [f"{value:.0f}" for value in mtp["ms a training step, without and with"]]
    paired = "{:+.3f} ± {:.3f}".format(*mtp["difference, mean and spread"])
    block = [
        ["without", listed(mtp["bits per byte without"], 3), "", ms[0], "", ""],
        ["with", listed(mtp["with"], 3), paired, ms[1], listed(mtp["accepted"], 0, 100), listed(mtp["speed-up"], 2)],
    ]
    return {
        "peers": table(peers, ["", "ours, s", "of it to the first tokens", "transformers, s", "ratio"]),
        "bandwidth": table(rates, ["", "parameters", "tokens/s", "weights, GB/s", "limit, GB/s", "%"]),
        "concurrency": table(load, ["FP32, requests", "at once", "tokens/s", "first token, s", "later, ms", "cache, MB"]),
        "methods": table(methods, ["tokens/s, at once", "", "weights, MB", *by_method["FP32"]]),
        "length": table(
            [[name, *(shown(found, 1) for found in part.values())] for name, part in length.items()],
            ["ms of 16 rows, after so many tokens", *length["step"]],
        ),
        "mtp": table(block, ["block", "bits per byte", "paired", "ms a training step", "guesses right, %", "decoding, times as fast"]),
    }


def main():
    parts = {"peers": peers, "concurrency": concurrency, "bandwidth": bandwidth, "length": length, "mtp": mtp}
    args = cli.parse(__doc__, "stage", stage=dict(choices=list(parts), default=None, help="one part (default: all)"))
    results = kept("generation")
    for name in parts if args.stage is None else (args.stage,):
        results[name] = parts[name]()
        if name != "mtp":  # its runs say their own
            results.setdefault("threads", {})[name] = torch.get_num_threads()
        results = keep("generation", results)
    if {"concurrency", "length"} <= results.keys():
        plot(results, os.path.join(RESULTS, "generation.png"))


if __name__ == "__main__":
    cli.run(main)
