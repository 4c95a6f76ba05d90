"""Evaluation and the report: loss, bits per byte, task accuracy beside three baselines, plots (v2 §5).

Accuracy is generative: the model answers greedily and a scorer of data/scorers.py compares with the
reference. It stands beside three baselines that know nothing: the most frequent training answer,
a word copied from the prompt by rule, and the model itself with the product text cut away.

    python evaluate.py                                          # report of runs/demo
    python evaluate.py --tasks 50 --run runs/small --device cuda   # more tasks, narrower error
"""

import json
import os
import re
from collections import Counter, defaultdict

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from tqdm import tqdm

import cli
from checkpoint import STAGES, checkpoints, latest_stage, read_metrics, write_atomically
from data import reader
from data.scorers import SCORERS
from data.tasks import ECOMMERCE, fingerprint, tasks
from generate import GREEDY, generate, load_for_inference, split_thought

BASE = "long"  # the last pre-training stage answers plain text, not chats


@torch.inference_mode()
def bits_per_byte(model, tokenizer, documents, rows=16):
    """Mean bits to predict a UTF-8 byte, per language: {lang: bits}.

    Documents are cut into pieces of the context; the first token of a piece is given, so its bytes are
    not counted.
    """
    pieces, length = defaultdict(list), model.config.max_seq_len
    for document in documents:
        ids = tokenizer.encode(document["text"])
        pieces[document["lang"] or "?"] += [ids[i : i + length] for i in range(0, len(ids), length)]
    device, bits, result = next(model.parameters()).device, 0.0, {}
    for lang, group in sorted(pieces.items()):
        bits = nbytes = 0
        group = sorted((piece for piece in group if len(piece) > 1), key=len)
        for start in range(0, len(group), rows):
            batch = group[start : start + rows]
            width = len(batch[-1])
            tokens_BT = torch.tensor([ids + [0] * (width - len(ids)) for ids in batch], device=device)
            doc_ids_BT = torch.tensor([[0] * len(ids) + [-1] * (width - len(ids)) for ids in batch], device=device)
            weights_BT = (doc_ids_BT.roll(-1, 1) == 0).float()
            weights_BT[:, -1] = 0
            losses = model.loss(tokens_BT, tokens_BT.roll(-1, 1), weights_BT, doc_ids_BT=doc_ids_BT)
            bits += losses.lm.item() * weights_BT.sum().item() / np.log(2)
            nbytes += sum(len(tokenizer.encoding.decode_bytes(ids[1:])) for ids in batch)
        if nbytes:
            result[lang] = bits / nbytes
    return result


def without_text(task):
    """The task with the text cut away: of each message, what follows the last blank line."""
    messages = [{**m, "content": m["content"].rpartition("\n\n")[2]} for m in task["messages"]]
    return {**task, "messages": messages}


def answer_tasks(model, tokenizer, tasks, thinking=False, plain=False):
    """[(thought, answer), …] of each task, greedy. thinking: with the think prompt where the task has a "think"; plain: no
    chat template, the contents joined by line breaks and the rest of the line taken (for base models)."""
    prompts = []
    for task in tasks:
        if plain:
            prompts.append(tokenizer.encode("\n".join(message["content"] for message in task["messages"])))
        else:
            prompts.append(tokenizer.encode_chat(task["messages"], thinking=thinking and "think" in task)[0])
    completions = generate(model, tokenizer, prompts, GREEDY)
    if plain:
        return [("", completion.text.strip().split("\n")[0]) for completion in completions]
    return [split_thought(completion.text) for completion in completions]


def accuracy(tasks, answers):
    """{"overall", "by_group", "by_task", "by_language", "cells", "n"}: shares of tasks whose scorer accepts the answer."""
    hits = [SCORERS[task["scorer"]](answer, task["answer"]) for task, answer in zip(tasks, answers, strict=True)]

    def share(key):
        groups = defaultdict(list)
        for task, hit in zip(tasks, hits, strict=True):
            groups[key(task)].append(hit)
        return {name: sum(group) / len(group) for name, group in groups.items()}

    return {
        "overall": sum(hits) / len(hits),
        "by_group": share(lambda task: "e-commerce" if task["task"] in ECOMMERCE else "general"),
        "by_task": share(lambda task: task["task"]),
        "by_language": share(lambda task: task["lang"]),
        "cells": share(lambda task: f"{task['task']}/{task['lang']}"),
        "n": len(hits),
    }


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


def stage_losses(metrics):
    """{stage: mean lm loss of its last 50 steps}, {stage: median tokens per second}."""
    by_stage = defaultdict(list)
    for entry in metrics:
        if entry.get("lm") is not None:
            by_stage[entry["stage"]].append(entry)
    loss = {stage: float(np.mean([e["lm"] for e in entries[-50:]])) for stage, entries in by_stage.items()}
    speed = {stage: float(np.median([e["tokens_per_s"] for e in entries])) for stage, entries in by_stage.items()}
    return loss, speed


def plot_losses(metrics, path):
    stages = [stage for stage in STAGES if any(e["stage"] == stage for e in metrics)]
    figure, axes = plt.subplots(1, max(1, len(stages)), figsize=(3.2 * max(1, len(stages)), 3), squeeze=False)
    for axis, stage in zip(axes[0], stages, strict=False):
        entries = [e for e in metrics if e["stage"] == stage and e.get("lm") is not None]
        steps, losses = [e["step"] for e in entries], [e["lm"] for e in entries]
        width = min(25, len(losses))
        axis.plot(steps, losses, color="0.8", linewidth=0.8)
        axis.plot(steps[width - 1 :], np.convolve(losses, np.ones(width) / width, "valid"), color="tab:blue")
        axis.set(title=stage, xlabel="step")
    axes[0, 0].set_ylabel("loss on targets (nats)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_load(metrics, path):
    """Heat map of the last logged expert load, as multiples of an even share."""
    loads = [entry for entry in metrics if "load" in entry]
    if not loads:
        return None
    load_LE = np.array(loads[-1]["load"])
    load_LE = load_LE * load_LE.shape[1]
    figure, axis = plt.subplots(figsize=(7, 1.2 + 0.4 * len(load_LE)))
    image = axis.imshow(load_LE, vmin=0, vmax=2, cmap="RdBu_r", aspect="auto")
    axis.set(xlabel="expert", ylabel="layer", title=f"expert load after {loads[-1]['stage']} (1 is an even share)")
    axis.set_yticks(range(len(load_LE)))
    figure.colorbar(image)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return float(load_LE.max())


def plot_accuracy(result, title, path):
    """Heat map of accuracy, task by language."""
    names = sorted({cell.split("/")[0] for cell in result["cells"]})
    langs = sorted({cell.split("/")[1] for cell in result["cells"]})
    grid = np.array([[result["cells"].get(f"{name}/{lang}", np.nan) for lang in langs] for name in names])
    figure, axis = plt.subplots(figsize=(1.8 + 0.75 * len(langs), 1 + 0.42 * len(names)))
    axis.imshow(grid, vmin=0, vmax=1, cmap="YlGn", aspect="auto")
    axis.set_xticks(range(len(langs)), langs)
    axis.set_yticks(range(len(names)), names)
    for i, row in enumerate(grid):
        for j, value in enumerate(row):
            axis.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color="w" if value > 0.6 else "k")
    axis.set_title(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(rows, header):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def accuracy_table(results, tasks_hash):
    """Markdown: one row per task and language, one column per model or baseline, in percent."""
    names = list(results)
    first = results[names[0]]
    rows = [["all", *(f"{100 * results[n]['overall']:.1f}" for n in names)]]
    for group in ("by_group", "by_task", "by_language"):
        for key in first[group]:
            rows.append([key, *(f"{100 * results[n][group][key]:.1f}" for n in names)])
    return table(rows, [f"accuracy, % of {first['n']} held-out tasks, {tasks_hash}", *names])


def sample_chats(model, tokenizer, tasks):
    """One reasoning task per language of the first three, thinking on and off, as text."""
    lines = []
    chosen = {task["lang"]: task for task in reversed(tasks) if task["task"] == "numerical_reasoning"}
    for task in list(chosen.values())[:3]:
        lines.append(f"user: {task['messages'][-1]['content']}")
        for thinking in (True, False):
            thought, answer = answer_tasks(model, tokenizer, [task], thinking=thinking)[0]
            shown = f"<think>{thought}</think> {answer}" if thought else answer
            lines.append(f"compass, thinking {'on' if thinking else 'off'}: {shown}")
        lines.append(f"(reference: {task['answer']})\n")
    return "\n".join(lines)


def evaluate_stages(run, device, test, documents):
    """Accuracy and bits per byte of every evaluated stage in the run; returns (accuracy, bpb, chats)."""
    results, bits, chats, thinking = {}, {}, "", {}
    stages = [stage for stage in (BASE, "sft1", "sft2") if checkpoints(run, stage)] or [latest_stage(run)]
    for stage in tqdm(stages, desc="evaluate", unit="stage"):
        model, tokenizer = load_for_inference(run, device, stage)
        bits[stage] = bits_per_byte(model, tokenizer, documents)
        plain = not stage.startswith("sft")
        answers = answer_tasks(model, tokenizer, test, thinking=stage == "sft2", plain=plain)
        results[stage] = accuracy(test, [answer for _, answer in answers])
        if stage == stages[-1] and not plain:
            cut = answer_tasks(model, tokenizer, [without_text(t) for t in test], thinking=stage == "sft2")
            results["without text"] = accuracy(test, [answer for _, answer in cut])
            reasoning = [task for task in test if "think" in task]
            for on in (True, False):
                given = answer_tasks(model, tokenizer, reasoning, thinking=on)
                thinking["on" if on else "off"] = {
                    "accuracy": accuracy(reasoning, [a for _, a in given])["by_task"],
                    "with_thought": float(np.mean([bool(thought) for thought, _ in given])),
                }  # fmt: skip
            chats = sample_chats(model, tokenizer, test)
    return results, bits, thinking, chats


def write_report(run, report, chats, worst_load):
    """report.json and report.md; returns the markdown."""
    sections = ["# Report", "## Loss (nats per trained token, mean of the last 50 steps) and speed"]
    rows = [[stage, f"{loss:.3f}", f"{report['tokens_per_s'][stage]:,.0f}"] for stage, loss in report["loss"].items()]
    sections += [table(rows, ["stage", "loss", "tokens/s"]), "![loss](loss.png)"]
    sections += ["## Accuracy on products and phrasings never seen in training", accuracy_table(report["accuracy"], report["tasks_hash"])]
    sections.append("majority, copy and without text are baselines that cannot know the answer. ![accuracy](accuracy.png)")
    if report["thinking"]:
        rows = [
            [name, *(f"{100 * report['thinking'][on]['accuracy'][name]:.1f}" for on in ("on", "off"))]
            for name in report["thinking"]["on"]["accuracy"]
        ]
        rows.append(["answers with a thought", *(f"{100 * report['thinking'][on]['with_thought']:.1f}" for on in ("on", "off"))])
        sections += ["## Thinking on and off", table(rows, ["%", "on", "off"])]
    langs = sorted({lang for values in report["bits_per_byte"].values() for lang in values})
    rows = [[s, *(f"{values[lang]:.3f}" for lang in langs)] for s, values in report["bits_per_byte"].items()]
    sections += ["## Bits per byte of held-out documents", table(rows, ["stage", *langs])]
    if worst_load:
        sections += ["## Expert load", f"The busiest expert takes {worst_load:.2f} times an even share. ![load](load.png)"]
    if chats:
        sections += ["## Sample chats", "```\n" + chats + "```"]
    markdown = "\n\n".join(sections) + "\n"
    write_atomically(os.path.join(run, "report.json"), json.dumps(report, indent=1, ensure_ascii=False).encode())
    write_atomically(os.path.join(run, "report.md"), markdown.encode())
    return markdown


def main():
    args = cli.parse(
        __doc__, "data", "run", "device", "seed",
        tasks=dict(type=int, default=5, help="held-out tasks per task and language"),
    )  # fmt: skip
    device = cli.pick_device(args.device)
    test = tasks("test", args.seed, args.tasks)
    results, bits, thinking, chats = evaluate_stages(
        args.run, device, test, list(reader.documents(args.data, "general", args.seed, "test"))
    )
    results["majority"] = accuracy(test, majority_answers(test, tasks("train", args.seed, 100)))
    results["copy"] = accuracy(test, copied_answers(test))
    metrics = read_metrics(args.run)
    loss, speed = stage_losses(metrics)
    report = {
        "tasks_hash": fingerprint(test), "loss": loss, "tokens_per_s": speed, "accuracy": results, "thinking": thinking,
        "bits_per_byte": bits,
    }  # fmt: skip
    plot_losses(metrics, os.path.join(args.run, "loss.png"))
    worst_load = plot_load(metrics, os.path.join(args.run, "load.png"))
    last = [stage for stage in STAGES if stage in results][-1]
    plot_accuracy(results[last], f"accuracy after {last}, %", os.path.join(args.run, "accuracy.png"))
    print(write_report(args.run, report, chats, worst_load))
    print(f"report and plots: {args.run}/report.md")


if __name__ == "__main__":
    cli.run(main)
