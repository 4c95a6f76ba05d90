"""The reward model: a scalar head on Compass that scores an answer, trained on preferences (v2 §4.1).

Bradley-Terry: the probability that the chosen answer beats the rejected one is σ(r_c - r_r). Several runs (epochs, learning rates,
schedules) start from one shared head, so that their weights may be averaged; held-out pairs compare the average with its members
(Best-of-N does in benchmarks/alignment.py).

Shapes: B pairs or rows, T tokens, D model width; P prompts with N answers each.

    python reward.py                                     # laptop: reward model of runs/demo on the embedded pairs
    python reward.py --data pairs.jsonl --run runs/small --device cuda
"""

import math
import os
from collections import Counter

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import cli
from checkpoint import checkpoints, discard, inherit, latest_stage, load_latest, load_weights, save_checkpoint
from cli import InputError
from compass import Compass, CompassConfig
from data.preferences import preferences
from data.reader import read_pairs
from sft import STAGES as TUNING
from sft import epoch_order
from tokenizer import Tokenizer
from train import Schedule, assemble, first_row, fit_stage, for_width, model_from, precision, processes, stage_schedule

# (epochs, peak rate, schedule) of the four runs that are averaged; the report has epochs 1 and 2, two rates, and both schedules, but
# not which four of the eight
MEMBERS = ((1, 3e-4, "cosine"), (1, 1e-4, "linear"), (2, 3e-4, "linear"), (2, 1e-4, "cosine"))
PAIRS = 8  # a step
PER_LANGUAGE = 300  # embedded pairs


def bradley_terry_loss(chosen_B, rejected_B):
    """-log σ(r_c - r_r), the mean over B (v2 §4.1). Only differences count: the rewards' zero is free."""
    return -F.logsigmoid(chosen_B - rejected_B).mean()


def average_weights(state_dicts):
    """The mean of several state dicts of one architecture, each tensor in its own dtype. Raises ValueError where names or shapes differ."""
    first = state_dicts[0]
    for other in state_dicts[1:]:
        differing = first.keys() ^ other.keys() or {name for name in first if first[name].shape != other[name].shape}
        if differing:
            raise ValueError(f"state dicts differ in {min(differing)}")
    return {name: torch.stack([state[name].double() for state in state_dicts]).mean(0).to(first[name].dtype) for name in first}


def best_of_n(rewards_PN, correct_PN):
    """{n: accuracy of the answer with the highest reward among n}, for n = 1, 2, 4, … and N, exactly over all subsets of size n.

    Of P prompts with N sampled answers each: an answer is picked from a random subset of n when it is in it and no better one is, which has
    probability C(N - 1 - rank, n - 1) / C(N, n). Ties go to the earlier answer.
    """
    N, order_PN = rewards_PN.shape[1], rewards_PN.argsort(dim=1, descending=True, stable=True)
    right = correct_PN.double().gather(1, order_PN).mean(0).tolist()  # share of prompts whose answer of that rank is right
    sizes = dict.fromkeys([*(2**i for i in range(N.bit_length())), N])
    return {n: sum(math.comb(N - 1 - rank, n - 1) * share for rank, share in enumerate(right)) / math.comb(N, n) for n in sizes}


class RewardModel(nn.Module):
    """Compass with a scalar head on the final state of a row's last token. Members of one seed share the head they start from."""

    def __init__(self, backbone, seed=0):
        super().__init__()
        self.backbone, self.config, self.ranks = backbone, backbone.config, backbone.ranks
        self.value = nn.Linear(backbone.config.dim, 1, bias=False)
        nn.init.normal_(self.value.weight, std=backbone.config.dim**-0.5, generator=torch.Generator().manual_seed(seed))
        if self.ranks.several:
            from parallel import shard

            shard(self.value, self.ranks.data)

    def forward(self, tokens_BT, doc_ids_BT):
        """rewards_B of whole conversations; doc_ids is -1 on the padding behind them."""
        h_BTD = self.backbone.norm(self.backbone.hidden(tokens_BT, doc_ids_BT=doc_ids_BT)[0])
        last_B = (doc_ids_BT >= 0).sum(1) - 1
        h_BD = h_BTD[torch.arange(len(last_B), device=last_B.device), last_B]
        with torch.autocast(h_BD.device.type, enabled=False):  # rewards that differ little must not be rounded to the same
            return self.value(h_BD.float()).squeeze(1)


def reward_loss(model, batch):
    """The loss function for `fit`."""
    chosen_B, rejected_B = model(batch["tokens"], batch["doc_ids"]).chunk(2)
    return bradley_terry_loss(chosen_B, rejected_B), {"accuracy": (chosen_B > rejected_B).float().mean()}


def encode_pairs(pairs, tokenizer):
    """[((ids, mask) chosen, (ids, mask) rejected), …], mask 1 on the last answer; and a Counter of pairs that teach nothing."""
    rows, left_out = [], Counter()
    for pair in pairs:
        answers = ({"role": "assistant", "content": pair[side]} for side in ("chosen", "rejected"))
        sides = [tokenizer.encode_chat([*pair["messages"], answer]) for answer in answers]
        prompt = len(tokenizer.encode_chat(pair["messages"])[0])
        if pair["chosen"].strip() == pair["rejected"].strip():
            left_out["identical answers"] += 1
        elif not pair["chosen"].strip() or not pair["rejected"].strip():
            left_out["an empty answer"] += 1
        else:
            rows.append([(ids, [0] * prompt + mask[prompt:]) for ids, mask in sides])  # earlier answers of the chat are not judged
    return rows, left_out


class Pairs:
    """Encoded pairs; `batch(step)` is a pure function of (seed, step): PAIRS of them, or one for each of so many ranks. What cannot be
    trained on is counted in `left_out` and printed."""

    def __init__(self, rows, left_out, context, seed, ranks=1):
        self.rows = [sides for sides in rows if max(len(ids) for ids, _ in sides) <= context]
        self.seed, self.left_out, self.per_step = seed, Counter(left_out), max(PAIRS, ranks)
        if len(self.rows) < len(rows):
            self.left_out[f"longer than the context of {context}"] = len(rows) - len(self.rows)
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.left_out.items() if count) or "none"
        print(f"{len(self.rows):,} pairs; left out: {reasons}")
        if not self.rows:
            raise InputError("no pair is left to train on")
        self.reference = None

    def assemble(self, chosen):
        """The pairs with these indices as one batch: tokens, mask, doc_ids (2n, T), reference (2n, T) once known, weights (n,)."""
        places = [(i, side) for side in (0, 1) for i in chosen]
        tokens, mask = ([torch.tensor(self.rows[i][side][what]) for i, side in places] for what in (0, 1))
        batch = {"tokens": tokens, "mask": mask, "doc_ids": [torch.zeros_like(ids) for ids in tokens]}
        if self.reference is not None:
            batch["reference"] = [self.reference[i][side] for i, side in places]
        padded = {name: pad_sequence(rows, batch_first=True, padding_value=-1 if name == "doc_ids" else 0) for name, rows in batch.items()}
        return {**padded, "weights": torch.ones(len(chosen))}

    def batch(self, step):
        n, k = len(self.rows), self.per_step
        return [self.assemble([epoch_order(n, self.seed, i // n)[i % n] for i in range(step * k, (step + 1) * k)])]


def load_pairs(path, tokenizer, context, seed, ranks):
    """The pairs of a file, or the embedded ones where path is None; ranks is None or parallel.Ranks."""
    pairs = read_pairs(path) if path else preferences("train", seed, PER_LANGUAGE)
    return Pairs(*encode_pairs(pairs, tokenizer), context, seed, ranks.count if ranks else 1)


@torch.no_grad()
def pair_accuracy(model, pairs, rows=32):
    """Share of pairs whose chosen answer gets the higher reward."""
    right, device = 0, next(model.parameters()).device
    for start in range(0, len(pairs.rows), rows):
        batch = pairs.assemble(range(start, min(len(pairs.rows), start + rows)))
        with precision(model, device):
            chosen_B, rejected_B = model(batch["tokens"].to(device), batch["doc_ids"].to(device)).chunk(2)
        right += int((chosen_B > rejected_B).sum())
    return right / len(pairs.rows)


@torch.no_grad()
def rewards(model, tokenizer, chats, rows=64):
    """The reward of each whole conversation, a list; the last message is the answer that is judged."""
    encoded, result, device = [tokenizer.encode_chat(chat) for chat in chats], [0.0] * len(chats), next(model.parameters()).device
    order = sorted(range(len(chats)), key=lambda i: len(encoded[i][0]))
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        batch = assemble([[encoded[i]] for i in chosen], len(encoded[chosen[-1]][0]))
        with precision(model, device):
            rewards_B = model(batch["tokens"].to(device), batch["doc_ids"].to(device))
        for i, reward in zip(chosen, rewards_B.tolist(), strict=True):
            result[i] = reward
    return result


def load_reward_model(run, device, stage="reward"):
    """(reward model in eval mode, its checkpoint's dict); stage "reward" is the average, "reward/1" … its members."""
    state = load_latest(run, stage)
    model = RewardModel(Compass(CompassConfig(**state["config"])))
    load_weights(model, state)
    return model.to(device).eval(), state


def processes_with_whole_rows(args):
    """train.processes for what judges whole answers: rows stay whole, so dp, ep and tp only."""
    stage = latest_stage(args.run, among=TUNING)
    device, ranks = processes(args, lambda: CompassConfig(**load_latest(args.run, stage, weights=False)["config"]))
    if ranks is not None and (ranks.layout.pp > 1 or ranks.layout.cp > 1):
        raise InputError(f"--parallel {args.parallel}: preferences are trained with dp, ep and tp; pp and cp would cut the answers")
    state = load_latest(args.run, stage, weights=ranks is None)
    inherit(state, tokenizer := Tokenizer.load(args.run), to_train=True)
    return device, ranks, tokenizer, state


def average_members(run, stages, device, seed):
    """Save the mean of the members' weights as stage "reward"."""
    average, last = load_reward_model(run, device, stages[0])
    members = [average, *(load_reward_model(run, device, stage)[0] for stage in stages[1:])]
    average.load_state_dict(average_weights([member.state_dict() for member in members]))
    path = os.path.join(run, "reward", f"step_{last['step']}.pt")
    save_checkpoint(path, average, step=last["step"], stage="reward", tokenizer_hash=last["tokenizer_hash"], seed=seed)
    for other in checkpoints(run, "reward"):
        if other != path:  # of members before these, who may have had more steps
            discard(other)


def main():
    args = cli.parse(
        __doc__, "data", "run", "steps", "resume", "device", "seed", "parallel",
        data=dict(help="pairs .jsonl: {messages, chosen, rejected} (default: the embedded pairs)"),
        steps=dict(help="optimizer steps of each member (default: its epochs)"),
    )  # fmt: skip
    device, ranks, tokenizer, state = processes_with_whole_rows(args)
    pairs = load_pairs(args.data, tokenizer, state["config"]["max_seq_len"], args.seed, ranks)
    held_out = Pairs(*encode_pairs(preferences("test", args.seed, 30), tokenizer), state["config"]["max_seq_len"], args.seed)
    stages = [f"reward/{member}" for member in range(1, len(MEMBERS) + 1)]
    for stage, (epochs, peak, shape) in zip(stages, MEMBERS, strict=True):
        begun = load_latest(args.run, stage, weights=False)["planned"] if args.resume and checkpoints(args.run, stage) else 0
        steps = args.steps or begun or epochs * math.ceil(len(pairs.rows) / pairs.per_step)  # begun perhaps by more ranks
        schedule = stage_schedule(stage, args, Schedule(steps, peak, 0.0, steps // 20, shape=shape), state["origin"])
        if schedule is not None:
            model = RewardModel(model_from(state, ranks, device), args.seed).to(device)
            fit_stage(model, pairs.batch, reward_loss, for_width(schedule, model.config), stage, args, tokenizer)
        elif load_latest(args.run, stage, weights=False).get("data") not in (None, first_row(pairs.batch(0)[0])):
            raise InputError(f"{args.run}/{stage} was trained on other pairs (the first row differs): the average would mix them")
    if ranks is not None:
        print(f"{len(stages)} members trained; python reward.py --run {args.run} --resume, in one process, averages and compares them")
        return
    average_members(args.run, stages, device, args.seed)
    for stage in ("reward", *stages):
        model, _ = load_reward_model(args.run, device, stage)
        share, n = 100 * pair_accuracy(model, held_out), len(held_out.rows)
        print(f"{stage:9} prefers the chosen answer in {share:.1f} % of {n} held-out pairs of the marketplace")


if __name__ == "__main__":
    cli.run(main)
