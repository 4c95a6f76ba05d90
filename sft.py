"""Supervised fine-tuning in two stages, with packing and hybrid thinking (v2 §3.2).

sft1 teaches general instructions with direct answers; sft2 adds chains of thought between <think> and
</think>, switched on by a system prompt, beside resampled direct ones. Conversations are packed by
best-fit decreasing into rows of the context; each sees only itself, and only answers are trained on.

    python sft.py                 # laptop: both stages on top of runs/demo
    python sft.py --stage sft1 --data tasks.jsonl --run runs/small --device cuda
"""

import math
import os
import random

import torch

import cli
from checkpoint import inherit, load_latest, load_model
from cli import InputError
from data.reader import read_jsonl
from data.tasks import training
from tokenizer import ROLES, Tokenizer
from train import Schedule, assemble, finished, fit, language_model_loss

# stage -> (the stage it starts from, schedule, tokens per step as rows of the context it packs to)
STAGES = {
    "sft1": ("long", Schedule(3400, 3e-3, 1e-4, 30, (0.1, 0.1))),
    "sft2": ("sft1", Schedule(1400, 1.5e-3, 5e-5, 20, (0.1, 0.1))),
}
PER_LANGUAGE = 7000  # embedded training tasks
CAPACITY, ROWS = 256, 6  # tokens a packed row, rows a step: many small steps beat few large ones


def pack(lengths, capacity):
    """Best-fit decreasing: bins of sample indices, each at most `capacity` tokens; O(n log capacity).

    Longest first, every sample goes to the bin it fills best. A segment tree over free space (leaf c is
    1 when some bin has exactly c tokens free) finds the smallest sufficient c. Raises
    InputError (a ValueError) naming the index of a sample that is longer than capacity, or empty.
    """
    size = 1 << capacity.bit_length()  # leaves 0..capacity
    tree = [0] * (2 * size)  # tree[i]: how many leaves below node i hold a bin
    bins_free = [[] for _ in range(capacity + 1)]
    bins = []

    def add(free, count):
        node = free + size
        while node:
            tree[node] += count
            node //= 2

    def smallest_at_least(free):
        node = free + size
        if tree[node]:
            return free
        while node > 1:  # climb until a right sibling holds something, then go down its left edge
            if node % 2 == 0 and tree[node + 1]:
                node += 1
                while node < size:
                    node = 2 * node if tree[2 * node] else 2 * node + 1
                return node - size
            node //= 2
        return None

    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not 0 < lengths[i] <= capacity:
            raise InputError(f"sample {i} has {lengths[i]} tokens; a packed row holds 1 to {capacity}")
        free = smallest_at_least(lengths[i])
        if free is None:
            b, free = len(bins), capacity
            bins.append([])
        else:
            b = bins_free[free].pop()
            add(free, -1)
        bins[b].append(i)
        if free > lengths[i]:
            bins_free[free - lengths[i]].append(b)
            add(free - lengths[i], 1)
    return bins


def collate(samples, bins, capacity=CAPACITY):
    """Packed rows of samples [(ids, loss_mask), …]: tokens, targets, weights, doc_ids, positions, all (bins, capacity).

    weights is 1 where the target is to be learnt; doc_ids is -1 on padding; positions restart in each sample.
    """
    batch = assemble([[samples[i] for i in members] for members in bins], capacity)
    return tuple(batch[name] for name in ("tokens", "targets", "weights", "doc_ids", "positions"))


def chat_of(task, thinking):
    """The conversation a task teaches: its messages and the reference answer, with the thought when thinking."""
    answer = {"role": "assistant", "content": task["answer"]}
    if thinking:
        answer["think"] = task["think"]
    return [*task["messages"], answer]


def curriculum(stage, examples, seed):
    """[(task, thinking), …] of a stage: sft1 answers directly what needs no thought; sft2 adds reasoning with its
    thought, and twice as many of everything, direct, so that nothing is forgotten and the switch is learnt. Where nothing
    has a thought, sft2 goes over everything once more."""
    reasoning = [task for task in examples if "think" in task]
    if stage == "sft1":
        if reasoning:
            print(f"sft1: {len(reasoning):,} of {len(examples):,} tasks have a thought and wait for sft2")
        if len(reasoning) == len(examples):
            raise InputError("sft1 needs tasks without a thought; all of these have one")
        return [(task, False) for task in examples if "think" not in task]
    resampled = random.Random(f"sft2-{seed}").sample(examples, k=min(len(examples), 2 * len(reasoning) or len(examples)))
    return [(task, True) for task in reasoning] + [(task, False) for task in resampled]


def read_tasks(path):
    """Tasks of a .jsonl file; a line without messages or answer, or with a bad message, is an error with its number."""
    if not os.path.isfile(path):
        raise InputError(f"--data {path}: no such task file")
    examples = []
    for number, task in read_jsonl(path):
        for field, kind in (("messages", list), ("answer", str)):
            if not isinstance(task.get(field), kind) or not task[field]:
                raise InputError(f'{path}:{number}: field "{field}" is missing, empty or no {kind.__name__}')
        for message in task["messages"]:
            fields = message if isinstance(message, dict) else {}
            if fields.get("role") not in ROLES or not isinstance(fields.get("content"), str):
                raise InputError(f"{path}:{number}: a message needs a role ({', '.join(ROLES)}) and a text as content, got {message!r}")
        if not isinstance(task.get("think", ""), str):
            raise InputError(f'{path}:{number}: field "think" is no str')
        examples.append(task)
    if not examples:
        raise InputError(f"{path}: empty file")
    return examples


class PackedChats:
    """Encoded, packed conversations; the batch of a step is a pure function of (seed, step)."""

    def __init__(self, chats, tokenizer, context, seed):
        self.samples = []
        too_long = []
        for i, (task, thinking) in enumerate(chats):
            sample = tokenizer.encode_chat(chat_of(task, thinking), thinking=thinking)
            (self.samples if len(sample[0]) <= context else too_long).append(sample)
            if len(sample[0]) > context:
                print(f"sample {task.get('id', i)} has {len(sample[0])} tokens, more than the context {context}: left out")
        if not self.samples:
            raise InputError("no conversation fits the context")
        longest = max(len(ids) for ids, _ in self.samples)
        self.capacity = max(CAPACITY, longest)
        self.bins = pack([len(ids) for ids, _ in self.samples], self.capacity)
        self.seed = seed
        filled = sum(len(ids) for ids, _ in self.samples) / (len(self.bins) * self.capacity)
        print(
            f"{len(self.samples):,} conversations in {len(self.bins):,} rows of {self.capacity} tokens, "
            f"{100 * filled:.1f} % filled; {len(too_long)} over-long left out"
        )

    def batch(self, step):
        chosen = []
        for i in range(step * ROWS, (step + 1) * ROWS):
            epoch, place = divmod(i, len(self.bins))
            if epoch != getattr(self, "epoch", None):
                self.epoch, self.order = epoch, list(range(len(self.bins)))
                random.Random(f"{self.seed}-{epoch}").shuffle(self.order)
            chosen.append(self.bins[self.order[place]])
        names = ("tokens", "targets", "weights", "doc_ids", "positions")
        return [dict(zip(names, collate(self.samples, chosen, self.capacity), strict=True))]


def run_stage(stage, args, device, tokenizer):
    before, schedule = STAGES[stage]
    state = load_latest(args.run, before, device)
    inherit(state, tokenizer)
    if args.steps:
        schedule = schedule._replace(steps=args.steps, warmup=min(schedule.warmup, args.steps // 10))
    if args.resume and finished(args.run, stage, schedule.steps):
        print(f"{stage}: already finished")
        return
    if args.data:
        examples = read_tasks(args.data)
    else:  # a short run needs less to read
        examples = training(args.seed, math.ceil(PER_LANGUAGE * min(1.0, schedule.steps / 500)))
    model = load_model(state, device)
    chats = PackedChats(curriculum(stage, examples, args.seed), tokenizer, model.config.max_seq_len, args.seed)
    fit(
        model, chats.batch, language_model_loss, schedule,
        run=args.run, stage=stage, tokenizer_hash=tokenizer.hash, seed=args.seed, resume=args.resume,
    )  # fmt: skip


def main():
    args = cli.parse(
        __doc__, "data", "run", "stage", "steps", "resume", "device", "seed",
        data=dict(help="task file .jsonl: {messages, answer, think?} (default: the embedded tasks)"),
        stage=dict(default="all", choices=("all", *STAGES)),
    )  # fmt: skip
    device, tokenizer = cli.pick_device(args.device), Tokenizer.load(args.run)
    torch.manual_seed(args.seed)
    for stage in STAGES if args.stage == "all" else (args.stage,):
        run_stage(stage, args, device, tokenizer)


if __name__ == "__main__":
    cli.run(main)
