"""Instruction tuning in parts: one stage or two, whose prompts to train on (v3's mixed loss), and what long thoughts cost the rest.

    stages   sft1 then sft2, against everything at once for as many steps
    loss     sft1 with the loss on answers only, and on the whole conversation of e-commerce, of the rest, of both
    thoughts sft2 with chains of thought, against sft2 with direct answers only

Each seed (initialisation and data order) trains its own base and then every arm from it, on two of the eight languages. Accuracy
is measured on held-out tasks, ten of each kind and language, thinking where an arm has learnt it; differences are
paired by seed. Finished seeds are kept in benchmarks/results/tuning.jsonl and not repeated.

    python -m benchmarks.tuning      # about 25 minutes on two cores
"""

import copy
import json

import numpy as np
import torch
from tqdm import tqdm

import cli
from benchmarks import finished, keep, keep_finished
from compass import CONFIGS, Compass
from data import market
from data.tasks import fingerprint, tasks, training
from evaluate import accuracy, answer_tasks, thinking_switch
from report import table
from sft import FULL, STAGES, Chats, curriculum, sft_loss
from tokenizer import train as train_tokenizer
from train import RECIPES, Tokenised, TokenRows, _train_step, language_model_loss, lr_at, make_optimizer

LANGS, SEEDS, SFT1, SFT2 = ("en", "id"), 3, 600, 300


def train(model, batches, loss_fn, schedule, name):
    optimizer = make_optimizer(model.train(), schedule.beta2)
    for step in tqdm(range(schedule.steps), desc=name, mininterval=5, leave=False):
        first, final = schedule.router
        model.router_scale = first + (final - first) * step / max(1, schedule.steps - 1)
        _train_step(model, optimizer, batches(step), loss_fn, lr_at(step, schedule), torch.device("cpu"))
    return model.eval()


def general_model(config, tokenised, steps, seed):
    """A model after so many steps of the general stage of `tiny`."""
    torch.manual_seed(seed)
    recipe, model = RECIPES["tiny"]["general"], Compass(config)
    rows = TokenRows(tokenised, recipe.seq_len, seed)
    schedule = recipe.schedule._replace(steps=steps)
    return train(model, rows.batches(recipe.rows, recipe.micro_rows), language_model_loss, schedule, f"general {seed}")


def marketplace():
    """({stage of pre-training: documents}, tokenizer), two languages."""
    documents = {stage: [d for d in market.documents(stage, 0) if d["lang"] in LANGS] for stage in ("general", "anneal")}
    return documents, train_tokenizer(documents["general"], CONFIGS["tiny"].vocab_size)


def base_model(documents, tokenizer, seed):
    torch.manual_seed(seed)
    model = Compass(CONFIGS["tiny"])
    for stage in ("general", "anneal"):
        recipe = RECIPES["tiny"][stage]
        rows = TokenRows(Tokenised(documents[stage], tokenizer), recipe.seq_len, seed)
        train(model, rows.batches(recipe.rows, recipe.micro_rows), language_model_loss, recipe.schedule, f"{stage} {seed}")
    model.config.max_seq_len = 1024
    return model


def tuned(model, stage, chosen, steps, tokenizer, seed, full="none"):
    """A copy of the model after `steps` of a stage on the chosen conversations."""
    chats = Chats(chosen, tokenizer, 1024, seed, full=FULL[full])
    return train(copy.deepcopy(model), chats.batch, sft_loss, STAGES[stage][1]._replace(steps=steps), f"{stage} {full} {seed}")


def figures(model, tokenizer, test, thinking):
    """Shares of the held-out tasks: all, by group, those that need no thought, and reasoning with the switch on and off."""

    def ask(asked, thinking):
        return answer_tasks(model, tokenizer, asked, thinking=thinking)

    def score(asked, on):
        return accuracy(asked, [answer for _, answer in ask(asked, on)])

    whole, switch = score(test, thinking), thinking_switch(test, ask)
    direct, reasoning = ([task for task in test if ("think" in task) == thinks] for thinks in (False, True))
    plain = score(direct, False)
    made = {"all": whole["overall"], **whole["by_group"], "direct": plain["overall"], "general direct": plain["by_group"]["general"]}
    for name in ("on", "off"):
        made[f"reasoning {name}"] = score(reasoning, name == "on")["overall"]
        made[f"numerical {name}"] = switch[name]["accuracy"]["numerical_reasoning"]
        made |= {f"{key} {name}": switch[name][key] for key in ("with_thought", "characters")}
    return made


def arms(model, examples, tokenizer, seed):
    """Yield (arm, model, thinking); later arms start from earlier ones."""
    direct, second = curriculum("sft1", examples, seed), curriculum("sft2", examples, seed)
    sft1 = tuned(model, "sft1", direct, SFT1, tokenizer, seed)
    yield "sft1, answers only", sft1, False
    yield "sft1 then sft2", tuned(sft1, "sft2", second, SFT2, tokenizer, seed), True
    yield "sft1 then sft2 without thoughts", tuned(sft1, "sft2", [(t, False) for t, _ in second], SFT2, tokenizer, seed), False
    yield "one stage", tuned(model, "sft1", direct + second, SFT1 + SFT2, tokenizer, seed), True
    for full in ("e-commerce", "general", "all"):
        yield f"sft1, full loss on {full}", tuned(model, "sft1", direct, SFT1, tokenizer, seed, full), False


def tables(results):
    arms = results["arms"]

    def spread(values, digits):
        return f"{100 * np.mean(values):.{digits}f} ± {100 * np.std(values, ddof=1):.{digits}f}"

    def paired(what, arm, other):
        differences = (np.subtract(arms[arm][name], arms[other][name]) for name in ("all", "direct", "general direct"))
        return [what, *(", ".join(f"{100 * value:+.1f}" for value in values) for values in differences)]

    rows = [[name, ", ".join(f"{100 * value:.1f}" for value in arm["all"]), spread(arm["all"], 1)] for name, arm in arms.items()]
    against = [
        paired("one stage against two", "one stage", "sft1 then sft2"),
        paired("thoughts against none", "sft1 then sft2", "sft1 then sft2 without thoughts"),
    ]
    thoughts = {name: [arms[name][f"with_thought {side}"] for side in ("on", "off")] for name in ("sft1 then sft2", "one stage")}
    switch = [[name, *(spread(values, 0) for values in sides)] for name, sides in thoughts.items()]
    return {
        "arms": table(rows, ["accuracy, %", "seeds", "mean ± standard deviation"]),
        "paired": table(against, ["points, paired by seed", "all tasks", "direct tasks", "direct general tasks"]),
        "switch": table(switch, ["reasoning answers with a thought, %", "switched on", "off"]),
    }


def main():
    cli.parse(__doc__)
    documents, tokenizer = marketplace()
    examples = [task for task in training(0, 7000) if task["id"].split("-")[1] in LANGS]
    test = [task for task in tasks("test", 0, 10) if task["lang"] in LANGS]
    runs = finished("tuning")
    for seed in range(SEEDS):
        if sum(run["seed"] == seed for run in runs) == 7:
            continue
        runs = [run for run in runs if run["seed"] != seed]
        for arm, model, thinking in arms(base_model(documents, tokenizer, seed), examples, tokenizer, seed):
            runs.append({"arm": arm, "seed": seed, **figures(model, tokenizer, test, thinking)})
            print(json.dumps(runs[-1]), flush=True)
        keep_finished("tuning", runs)
    reference = {run["seed"]: run for run in runs if run["arm"] == "sft1, answers only"}
    made = {}
    for arm in dict.fromkeys(run["arm"] for run in runs):
        mine = [run for run in runs if run["arm"] == arm]
        names = [name for name in mine[0] if name not in ("arm", "seed")]
        made[arm] = {name: [run[name] for run in mine] for name in names}
        made[arm]["all against sft1"] = [run["all"] - reference[run["seed"]]["all"] for run in mine]
        print(f"{arm:34}", "  ".join(f"{name} {np.mean(v):.3f}±{np.std(v, ddof=1):.3f}" for name, v in made[arm].items()))
    keep("tuning", {"tasks_hash": fingerprint(test), "languages": LANGS, "arms": made})


if __name__ == "__main__":
    cli.run(main)
