"""The reward model and online DPO on a trained run (v2 §4): is the average of four better than its members, and do three rounds help?

Of each held-out task 32 answers are sampled; Best-of-N takes the one with the highest reward, by each member and by the average of their
weights. Then three rounds of online DPO twice: with the hardest wrong answer as the rejected one (the report's rule: the wrong answer that
the reward model likes best), and with any wrong answer. After each round on held-out tasks: accuracy and length of greedy answers,
the reward model's opinion of them, and the KL from the model before, estimated on sampled answers in nats a token. One seed.

    mkdir -p runs && cp -r checkpoints/tiny runs/alignment && python reward.py --run runs/alignment
    python -m benchmarks.alignment --run runs/alignment      # about ten minutes
"""

import copy
import json
import os
import random
from collections import Counter

import matplotlib.pyplot as plt
import numpy as np
import torch

import cli
from benchmarks import RESULTS, keep
from benchmarks.tuning import train
from data.preferences import preferences
from data.scorers import SCORERS
from data.tasks import fingerprint, tasks
from dpo import BETA, OPEN, ROUND, SAMPLES, add_reference, dpo_objective, label, reward_judge, sample_answers, token_logprobs
from evaluate import accuracy, answer_tasks
from generate import load_for_inference, split_thought
from report import save, table
from reward import MEMBERS, Pairs, best_of_n, encode_pairs, load_reward_model, pair_accuracy, rewards

ROUNDS, PER_CELL, HELD = 3, 1, 5  # of each task and language: prompts to sample for, held-out tasks to measure a round on


def chats(test, answers):
    return [[*task["messages"], {"role": "assistant", "content": answer}] for task, answer in zip(test, answers, strict=True)]


def majority_of_n(answers_PN, correct_PN):
    """{n: accuracy of the commonest of n answers, of equally common ones the first}, over SAMPLES / n groups of a task's answers."""
    found, n = {}, 1
    while n <= SAMPLES:
        chosen = []
        for answers, correct in zip(answers_PN, correct_PN.tolist(), strict=True):
            for start in range(0, SAMPLES - SAMPLES % n, n):
                commonest = Counter(answers[start : start + n]).most_common(1)[0][0]
                chosen.append(correct[answers.index(commonest, start)])
        found[n] = sum(chosen) / len(chosen)
        n *= 2
    return found


def best_of_samples(run, model, tokenizer, test):
    """{reward model: {"pairs": accuracy on held-out pairs, "best of n": {n: accuracy}, "error": {n: standard error, over the tasks, of the
    difference from n = 1}}} for the members and their average; and, {n: accuracy}, pass@n and the majority's answer."""
    _, completions = sample_answers(model, tokenizer, test, SAMPLES, seed=1)
    answers = [split_thought(completion.text)[1] for completion in completions]
    repeated = [task for task in test for _ in range(SAMPLES)]
    right = [SCORERS[task["scorer"]](answer, task["answer"]) for task, answer in zip(repeated, answers, strict=True)]
    correct_PN = torch.tensor(right).view(len(test), SAMPLES)
    held = Pairs(*encode_pairs(preferences("test", 0, 60), tokenizer), model.config.max_seq_len, 0)
    by_task = [answers[i : i + SAMPLES] for i in range(0, len(answers), SAMPLES)]
    found = {
        "pass@n": best_of_n(correct_PN.double(), correct_PN),  # an oracle's rewards
        "majority": majority_of_n(by_task, correct_PN),
    }
    for name in ("reward", *(f"reward/{member}" for member in range(1, len(MEMBERS) + 1))):
        judge = load_reward_model(run, torch.device("cpu"), name)[0]
        rewards_PN = torch.tensor(rewards(judge, tokenizer, chats(repeated, answers))).view(len(test), SAMPLES)
        alone = [best_of_n(*task) for task in zip(rewards_PN.split(1), correct_PN.split(1), strict=True)]
        gains = {n: np.array([task[n] - task[1] for task in alone]) for n in alone[0]}
        error = {n: float(gain.std(ddof=1) / len(test) ** 0.5) for n, gain in gains.items()}
        found[name] = {"pairs": pair_accuracy(judge, held), "best of n": best_of_n(rewards_PN, correct_PN), "error": error}
        print(name, json.dumps(found[name]), flush=True)
    return found


@torch.no_grad()
def divergence(model, reference, tokenizer, test):
    """Mean log-ratio of the model to the reference on answers sampled from the model, in nats a token: an estimate of the KL."""
    prompts, completions = sample_answers(model, tokenizer, test, 1, seed=2)
    ratios = []
    for prompt, completion in zip(prompts, completions, strict=True):
        if completion.ids:
            tokens_BT = torch.tensor([[*prompt, *completion.ids]])
            mask_BT = torch.arange(tokens_BT.shape[1]).unsqueeze(0) >= len(prompt)
            ratios.append((token_logprobs(model, tokens_BT, mask_BT) - token_logprobs(reference, tokens_BT, mask_BT))[mask_BT])
    return torch.cat(ratios).mean().item()


def measure(model, reference, judge, tokenizer, test):
    answers = [answer for _, answer in answer_tasks(model, tokenizer, test, thinking=True)]
    result = accuracy(test, answers)
    return {
        "accuracy": result["overall"], **result["by_group"], "reward": float(np.mean(rewards(judge, tokenizer, chats(test, answers)))),
        "characters": float(np.mean([len(answer) for answer in answers])), "kl": divergence(model, reference, tokenizer, test),
    }  # fmt: skip


def random_wrong(judge, rng):
    """The judge, but a wrong answer's reward is a random number: which of them is rejected is then a matter of chance."""

    def judged(task, answers):
        if task["scorer"] in OPEN:  # no rule says which are wrong
            return judge(task, answers)
        pairs = zip(answers, judge(task, answers), strict=True)
        return [reward if SCORERS[task["scorer"]](answer, task["answer"]) else rng.random() for answer, reward in pairs]

    return judged


def rounds(name, model, reward_model, tokenizer, test, judge):
    """Figures before and after each round of one arm."""
    reference, history = model, [measure(model, model, reward_model, tokenizer, test)]
    model = copy.deepcopy(model)
    for turn in range(1, ROUNDS + 1):
        examples = tasks("train", f"alignment-{turn}", PER_CELL)
        prompts, completions = sample_answers(model, tokenizer, examples, SAMPLES, seed=turn)
        rows, left_out = label(tokenizer, examples, prompts, completions, judge)
        pairs = Pairs(rows, left_out, model.config.max_seq_len, turn)
        add_reference(pairs, reference)
        model = train(model, pairs.batch, dpo_objective(BETA), ROUND, f"{name} round {turn}")
        history.append({**measure(model, reference, reward_model, tokenizer, test), "pairs": len(pairs.rows), "left out": dict(left_out)})
        print(name, turn, json.dumps(history[-1]), flush=True)
    return history


def plot(results, path):
    figure, axis = plt.subplots(figsize=(6, 3.6))
    labels = {"pass@n": "pass@n", "majority": "the commonest answer", "reward": "average of the members", "reward/1": "members"}
    for name, result in results["best of n"].items():
        curve = result.get("best of n", result)
        style = {"pass@n": "k:", "majority": "tab:blue", "reward": "tab:red"}.get(name, "0.6")
        numbers = [int(n) for n in curve]
        axis.plot(numbers, [100 * value for value in curve.values()], style, label=labels.get(name))
    axis.set(xscale="log", xlabel="answers sampled, n", ylabel="accuracy of the chosen answer, %", xticks=numbers, xticklabels=numbers)
    axis.minorticks_off()
    axis.legend(loc="lower left")
    save(figure, path)


def tables(results):
    found = results["best of n"]
    best = []
    for row, name in (("an oracle: pass@n", "pass@n"), ("the commonest answer", "majority")):
        best.append([row, "", *(f"{100 * value:.1f}" for value in found[name].values())])
    for name, judge in found.items():
        if "pairs" in judge:
            curve = (f"{100 * value:.1f}" for value in judge["best of n"].values())
            label = "average" if name == "reward" else name.replace("reward/", "member ")
            best.append([label, f"{100 * judge['pairs']:.1f}", *curve])
    means, errors = found["reward"]["best of n"], found["reward"]["error"]
    against = (f"{100 * (means[n] - means['1']):+.1f} ± {100 * errors[n]:.1f}" for n in means)
    best.append(["average, against n = 1 (standard error)", "", *against])
    rows = []
    for name, history in results["rounds"].items():
        for turn, r in enumerate(history):
            if turn or not rows:  # before the first round both arms are the same model
                label = f"{name}, round {turn}" if turn else "before"
                rest = f"{r['reward']:.3f}", f"{r['characters']:.1f}", f"{r['kl']:.4f}"
                rows.append([label, r.get("pairs", ""), f"{100 * r['accuracy']:.1f}", *rest])
    return {
        "best": table(best, ["%", "pairs", *(f"n = {n}" for n in found["pass@n"])]),
        "rounds": table(rows, ["rejected answer", "pairs", "accuracy, %", "reward", "characters", "KL, nats a token"]),
    }


def main():
    args = cli.parse(__doc__, "run", run=dict(default="runs/alignment"))
    device = torch.device("cpu")
    model, tokenizer = load_for_inference(args.run, device)
    reward_model, _ = load_reward_model(args.run, device)
    test, held = tasks("test", 0, PER_CELL), tasks("test", 0, HELD)
    found = best_of_samples(args.run, model, tokenizer, test)
    results = {"tasks_hash": fingerprint(test), "rounds' tasks": fingerprint(held), "best of n": found, "rounds": {}}
    plot(results, os.path.join(RESULTS, "alignment.png"))
    judge = reward_judge(reward_model, tokenizer)
    for name, arm in (("hardest wrong", judge), ("random wrong", random_wrong(judge, random.Random(0)))):
        results["rounds"][name] = rounds(name, model, reward_model, tokenizer, held, arm)
    keep("alignment", results)


if __name__ == "__main__":
    cli.run(main)
