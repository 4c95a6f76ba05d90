"""What a run has to show: curves, heat maps and tables, drawn from figures that others measured.

evaluate.py fills the dict `report` and calls `write_report`; report.json holds the same figures for programs.
"""

import io
import json
import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from checkpoint import LAST, STAGES
from cli import write_atomically

plt.rcParams["figure.constrained_layout.use"] = True


def by_stage(metrics):
    """{stage: its entries with a loss}, in training order."""
    logged = {stage: [e for e in metrics if e["stage"] == stage and e.get("lm") is not None] for stage in STAGES}
    return {stage: entries for stage, entries in logged.items() if entries}


def stage_losses(metrics):
    """{stage: mean lm loss of its LAST steps}, {stage: median tokens per second}."""
    logged = by_stage(metrics)
    loss = {stage: float(np.mean([e["lm"] for e in es if e["step"] > es[-1]["step"] - LAST])) for stage, es in logged.items()}
    return loss, {stage: float(np.median([e["tokens_per_s"] for e in entries])) for stage, entries in logged.items()}


def save(figure, path):
    image = io.BytesIO()
    figure.savefig(image, dpi=110)
    plt.close(figure)
    write_atomically(path, image.getvalue())


def percent_map(axis, grid_RC, columns, rows):
    """A heat map of shares with their per cents written in; nan where there is none."""
    axis.imshow(grid_RC, vmin=0, vmax=1, cmap="YlGn", aspect="auto")
    for (i, j), share in np.ndenumerate(grid_RC):
        if share == share:
            axis.text(j, i, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color="w" if share > 0.6 else "k")
    axis.set_xticks(range(len(columns)), columns, parse_math=False)  # a task of the user's may be called "$5 or $10"
    axis.set_yticks(range(len(rows)), rows, parse_math=False)


def plot_losses(metrics, path):
    logged = by_stage(metrics)
    figure, axes = plt.subplots(1, max(1, len(logged)), figsize=(3.2 * max(1, len(logged)), 3), squeeze=False)
    for axis, (stage, entries) in zip(axes[0], logged.items(), strict=False):
        steps, losses = [e["step"] for e in entries], [e["lm"] for e in entries]
        width = min(25, len(losses))
        axis.plot(steps, losses, color="0.8", linewidth=0.8)
        axis.plot(steps[width - 1 :], np.convolve(losses, np.ones(width) / width, "valid"), color="tab:blue")
        axis.set(title=stage, xlabel="step", yscale="log")
    axes[0, 0].set_ylabel("loss on targets (nats)")
    save(figure, path)


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
    save(figure, path)
    return float(load_LE.max())


def plot_accuracy(result, title, path):
    """Accuracy, task by language; a task need not be there in every language."""
    names, langs = sorted(result["by_task"]), sorted(result["by_language"])
    grid = np.array([[result["cells"].get(f"{name}/{lang}", np.nan) for lang in langs] for name in names])
    figure, axis = plt.subplots(figsize=(1.8 + 0.75 * len(langs), 1 + 0.42 * len(names)))
    percent_map(axis, grid, langs, names)
    axis.set_title(title)
    save(figure, path)


def plot_needles(found, path):
    """A heat map of the needles found for each name in `found`, depth by length, line retrieval below; see evaluate.retrieval."""
    figure, axes = plt.subplots(1, len(found), figsize=(1.2 + 3.4 * len(found), 3.2), sharey=True, squeeze=False)
    for axis, (name, result) in zip(axes[0], found.items(), strict=True):
        grid = np.vstack([np.array(result["needles"]).T, result["lines"]])
        percent_map(axis, grid, result["lengths"], [*(f"{100 * depth:.0f} %" for depth in result["depths"]), "a line of many"])
        axis.set(title=name, xlabel="tokens")
    axes[0, 0].set_ylabel("depth of the needle")
    figure.suptitle("needles found, %")
    save(figure, path)


def table(rows, header):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines)


def accuracy_table(results, tasks_hash, last):
    """Markdown: one row per task and language, one column per model or baseline, in percent; the interval is the last model's."""
    final = results[last]

    def row(name, shares, low, high):
        return [name, *(f"{100 * share:.1f}" for share in shares), f"{100 * max(0.0, low):.0f} to {100 * high:.0f}"]

    rows = [row("all", (result["overall"] for result in results.values()), *final["intervals"]["overall"])]
    for group in ("by_group", "by_task", "by_language"):
        for key in final[group]:
            rows.append(row(key, (result[group][key] for result in results.values()), *final["intervals"][group][key]))
    return table(rows, [f"accuracy, % of {final['n']} held-out tasks, {tasks_hash}", *results, f"95 % interval, {last}"])


def thinking_table(switch):
    on, off = switch["on"], switch["off"]
    rows = [[name, *(f"{100 * side['accuracy'][name]:.1f}" for side in (on, off))] for name in on["accuracy"]]
    rows.append(["answers with a thought, %", *(f"{100 * side['with_thought']:.1f}" for side in (on, off))])
    rows.append(["characters", *(f"{side['characters']:.0f}" for side in (on, off))])
    return table(rows, ["accuracy, %", "on", "off"])


def write_report(run, report, chats):
    """report.json, report.md, accuracy.png and needles.png; returns the markdown."""
    last = [stage for stage in STAGES if stage in report["accuracy"]][-1]
    sections = ["# Report", f"## Loss (nats per trained token, mean of the last {LAST} steps) and speed"]
    rows = [[stage, f"{loss:.3f}", f"{report['tokens_per_s'][stage]:,.0f}"] for stage, loss in report["loss"].items()]
    sections += [table(rows, ["stage", "loss", "tokens/s"]), "![loss](loss.png)"]
    sections.append(f"## Accuracy ({report['source']})")
    sections.append(accuracy_table(report["accuracy"], report["tasks_hash"], last))
    baselines = "majority, copy and without text are baselines that cannot know the answer, but where a task has no text to be cut away."
    sections.append(baselines + " ![accuracy](accuracy.png)")
    plot_accuracy(report["accuracy"][last], f"accuracy after {last}, %", os.path.join(run, "accuracy.png"))
    if report.get("thinking"):
        sections += ["## Thinking on and off", thinking_table(report["thinking"])]
    if report.get("choices"):
        rows = [
            [name, f"{100 * raw:.1f}", f"{100 * per_byte:.1f}", f"{100 * report['accuracy'][last]['by_task'][name]:.1f}", n]
            for name, (raw, per_byte, n) in report["choices"].items()
        ]
        header = ["task", "likeliest choice, %", "likeliest per byte, %", "free answer, %", "tasks"]
        sections += [f"## Multiple choice by likelihood, {last}", table(rows, header)]
    if "samples" in report:
        sections += ["## Sampled answers", table([[f"{100 * value:.1f}" for value in report["samples"].values()]], list(report["samples"]))]
    if report["retrieval"]:
        plot_needles(report["retrieval"], os.path.join(run, "needles.png"))
        sections += ["## Parcels found in long texts (guessing: 8 %)", "![needles](needles.png)"]
    langs = sorted({lang for values in report["bits_per_byte"].values() for lang in values})
    rows = [[s, f"{np.mean(list(v.values())):.3f}", *(f"{v[lang]:.3f}" for lang in langs)] for s, v in report["bits_per_byte"].items() if v]
    if langs:
        sections += ["## Bits per byte of held-out documents", table(rows, ["stage", "mean", *langs])]
    if report["busiest_expert"]:
        sections += ["## Expert load", f"The busiest expert takes {report['busiest_expert']:.2f} times an even share. ![load](load.png)"]
    if chats:
        sections += ["## Sample chats", "```\n" + chats + "```"]
    markdown = "\n\n".join(sections) + "\n"
    write_atomically(os.path.join(run, "report.json"), json.dumps(report, indent=1, ensure_ascii=False).encode())
    write_atomically(os.path.join(run, "report.md"), markdown.encode())
    return markdown
