"""The report's claims about its mixture of experts, tried on `tiny`: held-out loss, balance and time of siblings trained alike.

    shape   fine-grained with and without shared experts, coarse, dense: equal active width (v2 §2.2)
    losses  aux and z loss on, off and decayed: load entropy (1 is even), busiest expert, √mean(logsumexp²) of the router's logits
    grid    experts {4, 8, 16, 32} x top-k {1, 2, 4} of the same expert width
    v3      tiny against tiny_v3, few large experts: same total and active size (v3's claim is time)

Every arm trains STEPS steps on the embedded marketplace with three seeds (initialisation and data order) and is measured on held-out
documents, bits per byte averaged over the languages. Router flips: the share of tokens whose set of experts changes
when a trained router computes in bf16. Finished runs are kept in benchmarks/results/experts.jsonl and not repeated. Steps are timed
afterwards, on fresh models, the arms taking turns.

    python -m benchmarks.experts      # 60 runs, about 45 minutes on two cores
"""

import dataclasses
import json
import os
import statistics

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import cli
from benchmarks import RESULTS, finished, keep, keep_finished, timed
from compass import CONFIGS, Compass
from data import market
from evaluate import bits_per_byte
from report import save, table
from tokenizer import train as train_tokenizer
from train import RECIPES, Tokenised, TokenRows, _train_step, language_model_loss, lr_at, make_optimizer

STEPS, SEEDS = 200, 3
TINY = "fine-grained, 16 of 64 top-4 + 2 shared"


def arms():
    """{(experiment, arm): (config, router schedule)}; the schedule scales alpha and beta from the first to the last step."""
    tiny, still = CONFIGS["tiny"], (1.0, 1.0)

    def like(**changes):
        return dataclasses.replace(tiny, **changes)

    made = {
        ("shape", TINY): (tiny, still),
        ("shape", "fine-grained, 18 of 64 top-6"): (like(n_experts=18, top_k=6, n_shared=0), still),
        ("shape", "coarse, 6 of 192 top-2"): (like(n_experts=6, top_k=2, n_shared=0, expert_dim=192), still),
        ("shape", "dense, 384"): (like(n_experts=1, top_k=1, n_shared=0, expert_dim=384), still),
        ("losses", "neither"): (like(aux_weight=0.0, z_weight=0.0), still),
        ("losses", "aux only"): (like(z_weight=0.0), still),
        ("losses", "z only"): (like(aux_weight=0.0), still),
        ("losses", "aux and z, decayed to a tenth"): (tiny, (1.0, 0.1)),
        ("v3", "tiny_v3 without MTP"): (dataclasses.replace(CONFIGS["tiny_v3"], mtp_depth=0), still),
    }
    for E in (4, 8, 16, 32):
        for K in (1, 2, 4):
            if (E, K) != (16, 4):  # that is tiny itself
                made["grid", f"{E} experts, top-{K}"] = (like(n_experts=E, top_k=K), still)
    return made


def flips(model, tokens_BT):
    """Share of (token, layer) whose set of experts changes when the router's input and weights are rounded to bf16."""
    changed = []

    def look(router_layer, inputs, outputs):
        x_ND = inputs[0].reshape(-1, inputs[0].shape[-1])
        rounded_NE = F.linear(x_ND.bfloat16(), router_layer.router.weight.bfloat16())
        both = [index.sort(-1).values for index in (outputs[2], rounded_NE.softmax(-1).topk(router_layer.top_k).indices)]
        changed.append((both[0] != both[1]).any(-1).float().mean().item())

    hooks = [block.feed_forward.register_forward_hook(look) for block in model.blocks]
    with torch.no_grad():
        model(tokens_BT)
    for hook in hooks:
        hook.remove()
    return float(np.mean(changed))


def run(config, router, tokenised, tokenizer, held, seed):
    """Train one arm with one seed; its figures as a dict."""
    recipe = RECIPES["tiny"]["general"]
    schedule = recipe.schedule._replace(steps=STEPS, router=router)
    torch.manual_seed(seed)
    model = Compass(config)
    batches = TokenRows(tokenised, recipe.seq_len, seed).batches(recipe.rows, recipe.micro_rows)
    optimizer, last = make_optimizer(model, schedule.beta2), []
    for step in tqdm(range(STEPS), leave=False):
        first, final = schedule.router
        model.router_scale = first + (final - first) * step / max(1, STEPS - 1)
        *_, metrics = _train_step(model, optimizer, batches(step), language_model_loss, lr_at(step, schedule), torch.device("cpu"))
        last = (last + [metrics])[-20:]
    model.eval()
    load_LE = np.mean([m["load"] for m in last], axis=0)
    entropy = -(load_LE * np.log(load_LE.clip(1e-12))).sum(1) / np.log(max(2, load_LE.shape[1]))
    return {
        "bits": float(np.mean(list(bits_per_byte(model, tokenizer, held).values()))),
        "entropy": float(entropy.mean()), "busiest": float((load_LE * load_LE.shape[1]).max()),
        "logits": float(np.mean([m["z"] for m in last]) ** 0.5), "flips": flips(model, batches(0)[0]["tokens"]),
    }  # fmt: skip


def step_times(tokenised):
    """{(experiment, arm): seconds of a training step}."""
    recipe = RECIPES["tiny"]["general"]
    batch = TokenRows(tokenised, recipe.seq_len, 0).batches(recipe.rows, recipe.micro_rows)(0)

    def step_of(config):
        model = Compass(config)
        optimizer = make_optimizer(model)
        return lambda: _train_step(model, optimizer, batch, language_model_loss, 1e-3, torch.device("cpu"))

    seconds = timed({key: step_of(config) for key, (config, _) in arms().items()}, 15)
    return {key: statistics.median(rounds) for key, rounds in seconds.items()}


def summary(runs):
    """{experiment: {arm: {figure: [mean, spread]}}}, differences in bits paired by seed with tiny."""
    base = {r["seed"]: r["bits"] for r in runs if r["arm"] == TINY}
    made = {}
    for experiment, arm in dict.fromkeys((r["experiment"], r["arm"]) for r in runs):
        mine = [r for r in runs if (r["experiment"], r["arm"]) == (experiment, arm)]
        figures = {name: [r[name] for r in mine] for name in ("bits", "entropy", "busiest", "logits", "flips")}
        figures["bits against tiny"] = [r["bits"] - base[r["seed"]] for r in mine]
        spread = {name: [float(np.mean(v)), float(np.std(v, ddof=1)) if len(v) > 1 else 0.0] for name, v in figures.items()}
        made.setdefault(experiment, {})[arm] = spread
    return made


def plot(results, path):
    """Four panels: loss by shape, balance by loss weights, loss over the grid, few-large against many-small."""
    tiny = results["shape"][TINY]
    figure, axes = plt.subplots(2, 2, figsize=(12, 7))

    def dots(axis, rows, figure_name, title):
        means, spreads = zip(*(row[figure_name] for row in rows.values()), strict=True)
        axis.errorbar(means, range(len(rows)), xerr=spreads, fmt="o", color="tab:blue", capsize=3)
        axis.set_yticks(range(len(rows)), list(rows), fontsize=8)
        axis.set(title=title, ylim=(len(rows) - 0.5, -0.5))
        axis.grid(axis="x", alpha=0.4)

    dots(axes[0, 0], results["shape"], "bits against tiny", "bits per byte against tiny, equal active size")
    dots(axes[0, 1], {"aux and z": tiny, **results["losses"]}, "entropy", "entropy of expert load (1 is even)")
    grid = {**results["grid"], "16 experts, top-4": tiny}
    bits = np.array([[grid[f"{E} experts, top-{K}"]["bits"][0] for K in (1, 2, 4)] for E in (4, 8, 16, 32)])
    axes[1, 0].imshow(bits, cmap="YlGn_r", aspect="auto")
    for (i, j), value in np.ndenumerate(bits):
        axes[1, 0].text(j, i, f"{value:.3f}", ha="center", va="center", color="w" if value < bits.min() + 0.4 * np.ptp(bits) else "k")
    axes[1, 0].set_xticks(range(3), ["top-1", "top-2", "top-4"])
    axes[1, 0].set_yticks(range(4), ["4 experts", "8", "16", "32"])
    axes[1, 0].set_title("bits per byte, equal expert width")
    sizes = {"16 of 64, top-4": tiny, "8 of 128, top-2": results["v3"]["tiny_v3 without MTP"]}
    axes[1, 1].barh(list(sizes), [arm["ms"] for arm in sizes.values()], height=0.4)
    axes[1, 1].set(title="ms a training step, equal size", ylim=(1.5, -0.5))
    save(figure, path)


def tables(results):
    """A dense layer routes nothing: no balance, no flips."""
    tiny = results["shape"][TINY]

    def against(arm):
        return "" if arm is tiny else "{:+.3f} ± {:.3f}".format(*arm["bits against tiny"])

    shape, losses, grid = [], [], []
    for name, arm in {**results["shape"], **results["v3"]}.items():
        balance = f"{arm['entropy'][0]:.3f}", f"{arm['busiest'][0]:.2f}", f"{100 * arm['flips'][0]:.1f}"
        balance = ("", "", "") if name.startswith("dense") else balance
        shape.append([name, "{:.3f} ± {:.3f}".format(*arm["bits"]), against(arm), f"{arm['ms']:.0f}", *balance])
    for name, arm in {"aux and z": tiny, **results["losses"]}.items():
        balance = "{:.3f} ± {:.3f}".format(*arm["entropy"]), "{:.2f} ± {:.2f}".format(*arm["busiest"])
        losses.append([name, against(arm), *balance, f"{arm['logits'][0]:.2f}"])
    for E in (4, 8, 16, 32):
        arms = [results["grid"].get(f"{E} experts, top-{K}", tiny) for K in (1, 2, 4)]  # the arm that is missing is tiny itself
        cells = [f"{a['bits'][0]:.3f}, {a['ms']:.0f}, {a['busiest'][0]:.1f}, {100 * a['flips'][0]:.1f}" for a in arms]
        grid.append([f"{E} experts", *cells])
    balance = "load entropy", "busiest expert, times even"
    return {
        "shape": table(shape, ["equal active width", "bits per byte", "against tiny", "ms a step", *balance, "flips in bf16, % of tokens"]),
        "losses": table(losses, ["`tiny` with", "bits per byte against tiny", *balance, "√mean logsumexp² of the logits (of zeros: 2.77)"]),
        "grid": table(grid, ["bits per byte, ms a step, busiest expert, flips in %", "top-1", "top-2", "top-4"]),
    }


def main():
    cli.parse(__doc__)
    documents = list(market.documents("general", 0, per_language=800))
    held = list(market.documents("general", 0, "test", per_language=40))
    tokenizer = train_tokenizer(documents, CONFIGS["tiny"].vocab_size)
    tokenised, runs = Tokenised(documents, tokenizer), finished("experts")
    done = {(r["experiment"], r["arm"], r["seed"]) for r in runs}
    for (experiment, arm), (config, router) in arms().items():
        for seed in range(SEEDS):
            if (experiment, arm, seed) not in done:
                runs.append({"experiment": experiment, "arm": arm, "seed": seed, **run(config, router, tokenised, tokenizer, held, seed)})
                print(json.dumps(runs[-1]), flush=True)
                keep_finished("experts", runs)
    results = summary(runs)
    for (experiment, arm), seconds in step_times(tokenised).items():
        results[experiment][arm]["ms"] = 1e3 * seconds
    keep("experts", results)
    plot(results, os.path.join(RESULTS, "experts.png"))
    print("\n\n".join(tables(results).values()))


if __name__ == "__main__":
    cli.run(main)
