"""DPO, uniform weights and OTPO on the same pairs, and where optimal transport puts its weight (v3 §4; arXiv 2505.18720).

Three ways to weigh an answer's tokens, each tuned from the same model for the same steps with its own best beta: all ones (DPO), all
min(|y_c|, |y_r|) / length (uniform), and OTPO's. Two kinds of pairs: decisive ones, whose answers differ in one or two tokens, and
natural ones, whose answers are a right and a wrong one or a short and a long one. Seeds change the pairs and their order. On
held-out pairs and tasks: how often the chosen answer gains more probability than the rejected one, how often it is the likelier
one, what it gains in nats a token, accuracy and length of free answers. The picture shows the weights of two real pairs.

    python -m benchmarks.token_weights --run checkpoints/tiny      # about 20 minutes with one thread
"""

import copy
import difflib
import json
import os
import random

import matplotlib.pyplot as plt
import numpy as np
import torch

import cli
from benchmarks import RESULTS, keep
from benchmarks.tuning import train
from data.preferences import preferences
from data.tasks import fingerprint, tasks
from dpo import add_reference, token_logprobs
from evaluate import accuracy, answer_tasks
from generate import load_for_inference
from otpo import ot_token_weights, otpo_objective
from report import save, table
from reward import PAIRS, Pairs, encode_pairs
from train import Schedule

SEEDS, STEPS, PEAK, BETAS = 3, 100, 3e-5, (0.1, 0.3, 1.0, 3.0)
WEIGHTS = {"DPO": "ones", "uniform": "uniform", "OTPO": "transport"}
KINDS = {"decisive": ("decisive",), "natural": ("answer", "format")}


def draw_pairs(split, seed, kind, tokenizer, context, n):
    """About n pairs of a kind, as Pairs."""
    made = [pair for pair in preferences(split, seed, 3 * n // (8 * len(KINDS[kind]))) if pair["source"] in KINDS[kind]]
    random.Random(seed).shuffle(made)
    return Pairs(*encode_pairs(made, tokenizer), context, seed)


@torch.no_grad()
def on_pairs(model, pairs):
    """{"preferred", "likelier", "chosen gain"} on pairs whose reference log-probabilities are known."""
    found = []
    for start in range(0, len(pairs.rows), 16):
        batch = pairs.assemble(range(start, min(len(pairs.rows), start + 16)))
        logp_BT = token_logprobs(model, batch["tokens"], batch["mask"], doc_ids_BT=batch["doc_ids"])
        logp, gain = (x.sum(1).chunk(2) for x in (logp_BT, logp_BT - batch["reference"]))
        per_token = gain[0] / batch["mask"].chunk(2)[0].sum(1)
        found.append(torch.stack([(gain[0] > gain[1]).float(), (logp[0] > logp[1]).float(), per_token]))
    return dict(zip(("preferred", "likelier", "chosen gain"), torch.cat(found, 1).mean(1).tolist(), strict=True))


def on_tasks(model, tokenizer, test):
    """{"accuracy", "characters"} of greedy answers."""
    answers = [answer for _, answer in answer_tasks(model, tokenizer, test, thinking=True)]
    return {"accuracy": accuracy(test, answers)["overall"], "characters": float(np.mean([len(answer) for answer in answers]))}


def tune(model, pairs, weights, beta, name):
    schedule = Schedule(STEPS, PEAK, 0.0, STEPS // 10, (0.1, 0.1))
    return train(copy.deepcopy(model), pairs.batch, otpo_objective(beta, weights), schedule, name)


def differing(chosen, rejected):
    """For each token of both lists of ids, whether it has no equal partner in the other (longest matching blocks)."""
    alone = np.ones(len(chosen), bool), np.ones(len(rejected), bool)
    for block in difflib.SequenceMatcher(a=chosen, b=rejected, autojunk=False).get_matching_blocks():
        alone[0][block.a : block.a + block.size] = alone[1][block.b : block.b + block.size] = False
    return alone


@torch.no_grad()
def weights_of(model, pairs, i):
    """Of pair i: ([ids chosen, ids rejected], [weights, weights], [differing, differing]), answer tokens only."""
    batch = pairs.assemble([i])
    _, hidden_BTD = token_logprobs(model, batch["tokens"], batch["mask"], doc_ids_BT=batch["doc_ids"], return_hidden=True)
    masks = batch["mask"].float().chunk(2)
    weights = ot_token_weights(*hidden_BTD.chunk(2), *masks)
    ids = [tokens[0][mask[0] > 0].tolist() for tokens, mask in zip(batch["tokens"].chunk(2), masks, strict=True)]
    return ids, [w[0][mask[0] > 0].numpy() for w, mask in zip(weights, masks, strict=True)], differing(*ids)


def where_weight_goes(model, pairs):
    """Mean weight, as a multiple of the uniform weight of its answer, of tokens that differ and of tokens that match; and the largest
    weight over the smallest of an answer. Means over all pairs."""
    apart, same, ratio = [], [], []
    for i in range(len(pairs.rows)):
        _, weights, alone = weights_of(model, pairs, i)
        for w, lone in zip(weights, alone, strict=True):
            apart += (w[lone] / w.mean()).tolist()
            same += (w[~lone] / w.mean()).tolist()
            ratio.append(w.max() / w.min())
    return {"differing": float(np.mean(apart)), "matched": float(np.mean(same)), "largest over smallest": float(np.mean(ratio))}


def draw_pair(axis, tokenizer, ids, weights, alone):
    """The tokens of a pair as `weights_of` gives them, each as dark as its weight, those that stand alone framed in red."""
    low, high = min(map(min, weights)), max(map(max, weights))
    for row, (side, w, lone) in enumerate(zip(ids, weights, alone, strict=True)):
        for x, (token, value, other) in enumerate(zip(side, w, lone, strict=True)):
            shade = plt.cm.YlGn(0.05 + 0.55 * (value - low) / max(1e-9, high - low))
            axis.add_patch(plt.Rectangle((x, -row), 0.92, 0.8, fc=shade, ec="tab:red" if other else "none", lw=2))
            axis.text(x + 0.46, 0.5 - row, tokenizer.decode([token]).strip() or "␣", ha="center", va="center", fontsize=8)
            axis.text(x + 0.46, 0.17 - row, f"{value:.2f}", ha="center", va="center", fontsize=7)
    axis.set(xlim=(0, max(map(len, ids))), ylim=(-1.1, 0.9), xticks=[])
    axis.set_yticks([0.4, -0.6], ["chosen", "rejected"])


def picture(model, tokenizer, groups, path):
    """The first English pair of each kind."""
    figure, axes = plt.subplots(len(groups), 1, figsize=(13, 2.4 * len(groups)))
    for axis, (kind, pairs) in zip(axes, groups.items(), strict=True):
        draw_pair(axis, tokenizer, *weights_of(model, pairs, 0))
        axis.set_title(f"a {kind} pair; red: no partner in the other answer")
    save(figure, path)


def tables(results):
    before, rows = results["before"], []
    shown = {"preferred": (100, 1), "likelier": (100, 1), "chosen gain": (1, 3), "accuracy": (100, 1), "characters": (1, 1)}
    for kind in KINDS:
        known = {**before[kind], **before}
        rows.append([f"{kind}, before", "", *(
            f"{scale * known[key]:.{digits}f}" if key not in ("preferred", "chosen gain") else "" for key, (scale, digits) in shown.items()
        )])  # fmt: skip
        for name in WEIGHTS:
            arm, cells = results["arms"][f"{kind}, {name}"], []
            for key, (scale, digits) in shown.items():
                values = [scale * run[key] for run in arm["runs"]]
                cells.append(f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}")
            rows.append([f"{kind}, {name}", arm["beta"], *cells])
    where = [[kind, *(f"{value:.3f}" for value in figures.values())] for kind, figures in results["where"].items()]
    header = ["pairs, weights", "β", "preferred, %", "likelier, %", "chosen gain, nats a token", "accuracy, %", "characters"]
    return {
        "arms": table(rows, header),
        "where": table(where, ["pairs", "tokens that differ", "tokens with an equal partner", "largest weight over smallest"]),
    }


def main():
    args = cli.parse(__doc__, "run", run=dict(default="checkpoints/tiny"))
    model, tokenizer = load_for_inference(args.run, torch.device("cpu"))
    context, test = model.config.max_seq_len, tasks("test", 0, 2)
    results = {"tasks_hash": fingerprint(test), "before": on_tasks(model, tokenizer, test), "where": {}, "arms": {}}
    pictured = {}
    for kind in KINDS:
        held, validation = (draw_pairs(split, seed, kind, tokenizer, context, 240) for split, seed in (("test", 0), ("train", 99)))
        for pairs in (held, validation):
            add_reference(pairs, model)
        results["before"][kind] = on_pairs(model, held)
        results["where"][kind] = where_weight_goes(model, held)
        shown = [pair for pair in preferences("test", 1, 3) if pair["source"] in KINDS[kind] and pair["lang"] == "en"]
        pictured[kind] = Pairs(*encode_pairs(shown, tokenizer), context, 0)
        train_pairs = [draw_pairs("train", seed, kind, tokenizer, context, STEPS * PAIRS) for seed in range(SEEDS)]
        for pairs in train_pairs:
            add_reference(pairs, model)
        for name, weights in WEIGHTS.items():
            tried = {beta: tune(model, train_pairs[0], weights, beta, f"{kind} {name}") for beta in BETAS}
            preferred = {beta: on_pairs(tuned, validation)["preferred"] for beta, tuned in tried.items()}
            beta = max(preferred, key=preferred.get)
            chosen = [tried[beta], *(tune(model, pairs, weights, beta, f"{kind} {name}") for pairs in train_pairs[1:])]
            runs = [{**on_pairs(tuned, held), **on_tasks(tuned, tokenizer, test)} for tuned in chosen]
            results["arms"][f"{kind}, {name}"] = {"beta": beta, "validation": preferred, "runs": runs}
            shown = (f"{key} {np.mean([run[key] for run in runs]):.3f}±{np.std([run[key] for run in runs], ddof=1):.3f}" for key in runs[0])
            print(f"{kind:9} {name:8} beta {beta:4}", "  ".join(shown), flush=True)
    keep("token_weights", results)
    print(json.dumps({"before": results["before"], "where": results["where"]}, indent=1))
    picture(model, tokenizer, pictured, os.path.join(RESULTS, "token_weights.png"))


if __name__ == "__main__":
    cli.run(main)
