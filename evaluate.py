"""Evaluation and the report: loss, bits per byte, task accuracy beside three baselines, retrieval from long texts, plots (v2 §5).

Accuracy is generative: the model answers greedily and a scorer of data/scorers.py compares with the
reference. It stands beside three baselines that know nothing: the most frequent answer of training (of your own tasks: of these),
a word copied from the prompt by rule, and the model itself with the product text cut away. Tasks with choices are also
scored by the likelihood of each choice. Answers are kept in <run>/answers.jsonl: a killed evaluation goes on.

Shapes: B rows, T tokens, A tokens of an answer, D model width, V vocabulary.

    python evaluate.py                                          # report of runs/demo
    python evaluate.py --tasks mine.jsonl                       # your own tasks (data/reader.py says what a line holds)
    python evaluate.py --tasks 50 --samples 8 --run runs/small --device cuda   # more tasks, 8 answers each
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import random
import re
from collections import Counter, defaultdict

import numpy as np
import torch
from tqdm import tqdm

import cli
from checkpoint import STAGES, checkpoints, checksum, latest_stage, load_latest, read_metrics
from cli import InputError
from data import reader
from data.market import LANGUAGES
from data.needles import line_retrieval, needle
from data.scorers import SCORERS
from data.tasks import ECOMMERCE, fingerprint, tasks
from generate import GREEDY, Sampling, generate, load_for_inference, split_thought, with_room
from report import plot_load, plot_losses, stage_losses, write_report
from sft import WITHOUT_THOUGHTS
from train import assemble, losses_of

PRETRAINING = ("general", "anneal", "market", "reasoning", "extend", "long", "mtp")  # these answer plain text, not chats
EVALUATED = ("long", "sft1", "sft2", "dpo", "otpo")  # and the run's last stage, whichever it is


@torch.inference_mode()
def score_continuations(model, tokenizer, pairs, rows=16):
    """[(log-probability in nats, whether greedy decoding would give it), …] of (prompt, continuation) pairs of token ids."""
    device, results = next(model.parameters()).device, [None] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        batch = [[*pairs[i][0], *pairs[i][1]] for i in chosen]
        width = max(map(len, batch))  # what pads a row stands after its tokens, where causal attention does not look
        tokens_BT = torch.tensor([ids + [0] * (width - len(ids)) for ids in batch], device=device)
        h_BTD = model.norm(model.hidden(tokens_BT)[0])
        for i, h_TD, ids in zip(chosen, h_BTD, batch, strict=True):
            answer_A = torch.tensor(pairs[i][1], device=device)
            logits_AV = model.head(h_TD[len(pairs[i][0]) - 1 : len(ids) - 1]).float()[:, : tokenizer.n_vocab]
            logp_A = logits_AV.log_softmax(-1).gather(1, answer_A.unsqueeze(1))
            results[i] = (logp_A.sum().item(), bool((logits_AV.argmax(1) == answer_A).all()))
    return results


def multiple_choice(model, tokenizer, tasks):
    """{task: (raw, normalised, n)}: share of tasks with choices whose answer has the largest log-probability, summed or per byte."""
    tasks = [task for task in tasks if "choices" in task]
    pairs, end = [], tokenizer.special["<|end|>"]
    for task in tasks:
        prompt = tokenizer.encode_chat(task["messages"])[0]
        pairs += [(prompt, [*tokenizer.encode(" " + choice), end]) for choice in task["choices"]]
        if (longest := max(len(prompt) + len(choice) for _, choice in pairs[-len(task["choices"]) :])) > model.config.max_seq_len:
            raise InputError(f"task {task['id']}: {longest} tokens with its longest choice, the context has {model.config.max_seq_len}")
    scores, hits = iter(score_continuations(model, tokenizer, pairs)), defaultdict(list)
    for task in tasks:
        choices = task["choices"]
        logp = [next(scores)[0] for _ in choices]
        per_byte = [value / len(choice.encode()) for value, choice in zip(logp, choices, strict=True)]
        hits[task["task"]].append([choices[int(np.argmax(values))] == task["answer"] for values in (logp, per_byte)])
    return {name: (*np.mean(values, axis=0).tolist(), len(values)) for name, values in hits.items()}


DEPTHS, NEEDLES = (0.0, 0.25, 0.5, 0.75, 1.0), 8  # where needles are hidden, how many a cell


def retrieval(model, tokenizer, lengths, seed=0, n=NEEDLES, langs=LANGUAGES, chat=False):
    """{"lengths", "depths", "needles"[length][depth], "lines"[length]}: shares of needles found greedily in texts of so many
    tokens (data/needles.py), as plain text or, with chat, as a user's message."""
    rng, langs = random.Random(f"needles-{seed}"), itertools.cycle(langs)
    pairs = []
    for length, depth, _ in itertools.product(lengths, (*DEPTHS, None), range(n)):
        lang = next(langs)
        prompt, answer = line_retrieval(tokenizer, lang, rng, length) if depth is None else needle(tokenizer, lang, rng, length, depth)
        ids = tokenizer.encode_chat([{"role": "user", "content": prompt}])[0] if chat else tokenizer.encode(prompt)
        pairs.append((ids, tokenizer.encode(answer)))
    found = np.array([greedy for _, greedy in score_continuations(model, tokenizer, pairs)]).reshape(len(lengths), -1, n).mean(-1)
    return {"lengths": lengths, "depths": DEPTHS, "needles": found[:, :-1].tolist(), "lines": found[:, -1].tolist()}


@torch.inference_mode()
def bits_per_byte(model, tokenizer, documents, rows=16):
    """Mean bits to predict a UTF-8 byte, per language: {lang: bits}.

    Documents are cut into pieces of the context; the first token of a piece is given, so its bytes are not counted.
    """
    pieces, length = defaultdict(list), model.config.max_seq_len
    rows = min(rows, max(1, 65536 // length))  # the mask of a batch has rows x length² places
    for document in documents:
        ids = tokenizer.encode(document["text"])
        pieces[document["lang"] or "?"] += [ids[i : i + length] for i in range(0, len(ids), length)]
    device, result = next(model.parameters()).device, {}
    for lang, group in sorted(pieces.items()):
        bits = nbytes = 0
        group = sorted((piece for piece in group if len(piece) > 1), key=len)
        for start in range(0, len(group), rows):
            part = group[start : start + rows]
            batch = assemble([[(ids, [1] * len(ids))] for ids in part], len(part[-1]))
            losses = losses_of(model, {name: x.to(device) for name, x in batch.items()})
            bits += losses.lm.item() * batch["weights"].sum().item() / np.log(2)
            nbytes += sum(len(tokenizer.encoding.decode_bytes(ids[1:])) for ids in part)
        if nbytes:
            result[lang] = bits / nbytes
    return result


def without_text(task):
    """The task with the text cut away: of each message, what follows the last blank line."""
    return {**task, "messages": [{**m, "content": m["content"].rpartition("\n\n")[2]} for m in task["messages"]]}


def answer_tasks(model, tokenizer, tasks, thinking=False, plain=False, kept=None):
    """[(thought, answer), …] of each task, greedy. thinking: with the think prompt where the task has a "think"; plain: no
    chat template, the contents joined by line breaks and the rest of the line taken (for base models). kept: an `Answers` to
    look answers up in and to add them to."""
    prompts = []
    for task in tasks:
        if plain:
            prompts.append(tokenizer.encode("\n".join(message["content"] for message in task["messages"])))
        else:
            prompts.append(tokenizer.encode_chat(task["messages"], thinking=thinking and "think" in task)[0])
        if len(prompts[-1]) >= model.config.max_seq_len:
            raise InputError(f"task {task['id']}: {len(prompts[-1])} tokens leave no room for an answer in {model.config.max_seq_len}")
    kept, greedy = Answers() if kept is None else kept, with_room(GREEDY, tokenizer, tasks)
    asked = {kept.key(prompt, greedy): prompt for prompt in prompts}
    missing = [prompt for key, prompt in asked.items() if key not in kept.texts]
    for start in range(0, len(missing), 256):
        part = missing[start : start + 256]
        kept.add(part, greedy, [completion.text for completion in generate(model, tokenizer, part, greedy)])
    texts = [kept.texts[kept.key(prompt, greedy)] for prompt in prompts]
    return [("", text.strip().split("\n")[0]) if plain else split_thought(text) for text in texts]


class Answers:
    """What one checkpoint has answered; kept in a file (None: only in memory), so that an evaluation can be resumed."""

    def __init__(self, path=None, checkpoint=""):
        self.path, self.checkpoint, self.texts = path, checkpoint, {}
        if path and os.path.exists(path):
            with open(path, "rb") as file:
                for line in file:
                    with contextlib.suppress(ValueError, TypeError):  # empty, or torn by a kill: answered again
                        self.texts.update([json.loads(line)])

    def key(self, prompt, sampling):
        return hashlib.sha256(f"{self.checkpoint} {sampling} {prompt}".encode()).hexdigest()[:32]

    def add(self, prompts, sampling, texts):
        new = {self.key(prompt, sampling): text for prompt, text in zip(prompts, texts, strict=True)}
        self.texts.update(new)
        if self.path:
            with open(self.path, "a", encoding="utf-8") as file:  # begins with a line break: the last line may be torn
                file.write("\n" + "\n".join(json.dumps(pair, ensure_ascii=False) for pair in new.items()) + "\n")


def best_of_samples(model, tokenizer, tasks, n, thinking, seed):
    """{"mean@1", "majority@n", "pass@n"} over n answers sampled for each task; thinking: with the think prompt where it has a "think"."""
    prompts = [tokenizer.encode_chat(task["messages"], thinking=thinking and "think" in task)[0] for task in tasks]
    sampling = with_room(Sampling(temperature=1.0, max_tokens=96, seed=seed), tokenizer, tasks)
    texts = [completion.text for completion in generate(model, tokenizer, prompts, sampling, n)]
    figures = []
    for i, task in enumerate(tasks):
        answers = [split_thought(text)[1] for text in texts[i * n : (i + 1) * n]]
        right = [SCORERS[task["scorer"]](answer, task["answer"]) for answer in answers]
        figures.append((np.mean(right), right[answers.index(Counter(answers).most_common(1)[0][0])], any(right)))
    return dict(zip(("mean@1", f"majority@{n}", f"pass@{n}"), np.mean(figures, axis=0).tolist(), strict=True))


def interval(hits, n, z=1.96):
    """Wilson's 95 % interval of a share of n."""
    share, spread = hits / n, z**2 / n
    middle, half = share + spread / 2, z * (share * (1 - share) / n + spread / (4 * n)) ** 0.5
    return [(middle - half) / (1 + spread), (middle + half) / (1 + spread)]


def interval_of(tasks, hits):
    """Wilson's interval of the share of hits; equal prompts have equal answers, so that n is n² / Σ count² of the prompts (Kish)."""
    counts = Counter(json.dumps(task["messages"]) for task in tasks)
    n = len(tasks) ** 2 / sum(count**2 for count in counts.values())
    return interval(np.mean(hits) * n, n)


def accuracy(tasks, answers):
    """{"overall", "by_group", "by_task", "by_language", "cells", "intervals", "n"}: shares of tasks whose scorer accepts the answer."""
    hits = [SCORERS[task["scorer"]](answer, task["answer"]) for task, answer in zip(tasks, answers, strict=True)]
    result = {"overall": sum(hits) / len(hits), "n": len(hits), "intervals": {"overall": interval_of(tasks, hits)}}
    for name, key_of in {
        "by_group": lambda task: "e-commerce" if task["task"] in ECOMMERCE else "general",
        "by_task": lambda task: task["task"],
        "by_language": lambda task: task["lang"],
        "cells": lambda task: f"{task['task']}/{task['lang']}",
    }.items():
        groups = defaultdict(list)
        for task, hit in zip(tasks, hits, strict=True):
            groups[key_of(task)].append((task, hit))
        result[name] = {key: float(np.mean([hit for _, hit in group])) for key, group in groups.items()}
        result["intervals"][name] = {key: interval_of(*zip(*group, strict=True)) for key, group in groups.items()}
    return result


def majority_answers(tasks, training):
    """The most frequent training answer of the same task and language."""
    counts = defaultdict(Counter)
    for task in training:
        counts[task["task"], task["lang"]][task["answer"]] += 1
    return [(counts[task["task"], task["lang"]].most_common(1) or [("", 0)])[0][0] for task in tasks]


def copied_answers(tasks):
    """The word after the longest question word that also stands in the text; else the text's first word."""
    answers = []
    for task in tasks:
        text, _, question = task["messages"][-1]["content"].rpartition("\n\n")
        text = text or task["messages"][0]["content"]
        words = re.findall(r"[\w\u0300-\u036f\u0e00-\u0e7f$₱฿₫¥.]+", text)
        known = sorted(re.findall(r"[\w\u0e00-\u0e7f]+", question), key=len, reverse=True)
        after = [words[words.index(word) + 1] for word in known if word in words[:-1]]
        answers.append((after or words or [""])[0])
    return answers


def sample_chats(tasks, ask):
    """One reasoning task of each of the first three languages, thinking on and off, as text."""
    lines, chosen = [], {}
    for task in tasks:
        if task["task"] == "numerical_reasoning":
            chosen.setdefault(task["lang"], task)
    for task in list(chosen.values())[:3]:
        lines.append(f"user: {task['messages'][-1]['content']}")
        for thinking in (True, False):
            thought, answer = ask([task], thinking=thinking)[0]
            shown = f"<think>{thought}</think> {answer}" if thought else answer
            lines.append(f"compass, thinking {'on' if thinking else 'off'}: {shown}")
        lines.append(f"(reference: {task['answer']})\n")
    return "\n".join(lines)


def thinking_switch(tasks, ask):
    """{"on", "off"}: accuracy, share of answers with a thought, and mean length in characters, of the tasks that need one; {}
    where none does."""
    reasoning, switch = [task for task in tasks if "think" in task], {}
    for name, on in (("on", True), ("off", False)) if reasoning else ():
        given = ask(reasoning, thinking=on)
        switch[name] = {
            "accuracy": accuracy(reasoning, [answer for _, answer in given])["by_task"],
            "with_thought": float(np.mean([bool(thought) for thought, _ in given])),
            "characters": float(np.mean([len(thought) + len(answer) for thought, answer in given])),
        }
    return switch


def evaluate_stages(run, device, test, documents, samples, seed=0):
    """Figures of every evaluated stage of the run, as the dict that report.py shows, and sample chats."""
    report = {"tasks_hash": fingerprint(test), "accuracy": {}, "bits_per_byte": {}, "retrieval": {}}
    chats = ""
    last = latest_stage(run)
    if samples > 1 and last in PRETRAINING:
        raise InputError(f"--samples {samples}: {last} answers plain text, and samples are of chats; tune it first (python sft.py)")
    stages = [stage for stage in STAGES if stage == last or stage in EVALUATED and checkpoints(run, stage)]
    for stage in tqdm(stages, desc="evaluate", unit="stage"):
        model, tokenizer = load_for_inference(run, device, stage)
        state = load_latest(run, stage, weights=False)
        kept = Answers(os.path.join(run, "answers.jsonl"), checksum(state["path"]))
        taught = state.get("base", "") if stage in ("dpo", "otpo") else stage
        plain, thinks = stage in PRETRAINING, not taught.startswith((*PRETRAINING, *WITHOUT_THOUGHTS))
        ask = functools.partial(answer_tasks, model, tokenizer, plain=plain, kept=kept)
        report["bits_per_byte"][stage] = bits_per_byte(model, tokenizer, documents)
        report["accuracy"][stage] = accuracy(test, [answer for _, answer in ask(test, thinking=thinks)])
        if plain or stage == last:  # a chat's roles take a few tokens of the context
            lengths = [model.config.max_seq_len // 2**i - 8 for i in (3, 2, 1, 0)]
            report["retrieval"][stage] = retrieval(model, tokenizer, lengths, seed, chat=not plain)
        if not plain and stage == last:
            cut = [without_text(task) for task in test]
            report["accuracy"]["without text"] = accuracy(cut, [answer for _, answer in ask(cut, thinking=thinks)])
            report["thinking"] = thinking_switch(test, ask)
            report["choices"] = multiple_choice(model, tokenizer, test)
            if samples > 1:
                report["samples"] = best_of_samples(model, tokenizer, test, samples, thinks, seed)
            chats = sample_chats(test, ask)
    return report, chats


def main():
    args = cli.parse(
        __doc__, "data", "run", "device", "seed",
        tasks=dict(default="5", help="held-out tasks per task and language, or a .jsonl file of your own"),
        samples=dict(type=int, default=1, help="answers to sample for mean@1, majority@N and pass@N (1: none)"),
    )  # fmt: skip
    if args.tasks.removeprefix("-").isdecimal() and int(args.tasks) < 1:
        raise InputError(f"--tasks is {args.tasks}, must be at least 1 or a file")
    device = cli.pick_device(args.device)
    test = tasks("test", args.seed, int(args.tasks)) if args.tasks.isdecimal() else reader.read_tasks(args.tasks)
    documents = list(reader.documents(args.data, "general", args.seed, "test"))
    if not documents:
        print(f"--data {args.data}: no document of it is held out, so there are no bits per byte")
    metrics = read_metrics(args.run)
    report, chats = evaluate_stages(args.run, device, test, documents, args.samples, args.seed)
    embedded = args.tasks.isdecimal()
    report["source"] = "embedded tasks: products and phrasings never seen in training" if embedded else reader.printable(args.tasks)
    report["accuracy"]["majority"] = accuracy(test, majority_answers(test, tasks("train", args.seed, 100) if embedded else test))
    report["accuracy"]["copy"] = accuracy(test, copied_answers(test))
    report["loss"], report["tokens_per_s"] = stage_losses(metrics)
    plot_losses(metrics, os.path.join(args.run, "loss.png"))
    report["busiest_expert"] = plot_load(metrics, os.path.join(args.run, "load.png"))
    print(write_report(args.run, report, chats))
    print(f"report and plots: {args.run}/report.md")


if __name__ == "__main__":
    cli.run(main)
