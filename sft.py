"""Supervised fine-tuning in two stages, with packing and hybrid thinking (v2 §3.2; v3 for the mixed loss).

sft1 teaches direct answers to what needs no thought; sft2 adds chains of thought between <think> and </think>, switched on by a
system prompt, beside resampled direct answers. A long training has two stages of our own between them (data/tasks.py): `--stage
pairs`, whether two words are the same and which number is larger, the steps that thoughts are made of, and `--stage drills`, thoughts
above all. Conversations are packed by best-fit decreasing into rows of 256 tokens (wider if one conversation is longer); each sees only
itself. Only answers are trained on; v3's mixed loss trains on the whole conversation where it is about e-commerce (`--full e-commerce`).

Shapes: B rows, T tokens.

    python sft.py                 # laptop: sft1 and sft2 on top of runs/demo
    python sft.py --stage sft1 --data tasks.jsonl --run runs/small --device cuda
"""

import bisect
import functools
import math
import random

import numpy as np
import torch

import cli
from checkpoint import checkpoints, inherit, load_latest
from cli import InputError
from compass import CompassConfig
from data.dedup import near_duplicates, signature
from data.reader import read_tasks
from data.scorers import SCORERS
from data.tasks import AFTER_DRILLS, DRILLS, ECOMMERCE, FIRST, LATER, PAIRS, tasks, training
from generate import Sampling, generate, load_for_inference, split_thought, with_room
from tokenizer import Tokenizer
from train import Schedule, assemble, fit_stage, for_width, logged, losses_of, model_from, processes, stage_schedule

# stage -> (the stages it may start from, the first that is there is taken; schedule). v3's pre-training ends with mtp, v2's with long
STAGES = {
    "sft1": (("mtp", "long"), Schedule(2200, 2e-3, 1e-4, 30, (0.1, 0.1), beta2=0.99)),
    "pairs": (("sft1",), Schedule(600, 1e-3, 1e-4, 20, (0.1, 0.1), beta2=0.99)),
    "drills": (("pairs", "sft1"), Schedule(1000, 1e-3, 1e-4, 20, (0.1, 0.1), beta2=0.99)),
    "sft2": (("drills", "pairs", "sft1"), Schedule(4000, 1e-3, 5e-5, 20, (0.1, 0.1), beta2=0.99)),
}
WITHOUT_THOUGHTS = ("sft1", "pairs")  # what they leave behind is not asked to think
PER_STEP, MOST = 3, 100_000  # embedded tasks a language: three for each optimizer step, so that a task is read about once, up to MOST
# shares and phrasings, see data/tasks.py: first the tasks, then more ways of asking for them, in a long training all of them
EXERCISES = {
    "sft1": (FIRST, 4), "pairs": (PAIRS, 4), "drills": (DRILLS, 4), "sft2": (LATER, None), "sft2 after drills": (AFTER_DRILLS, math.inf),
}  # fmt: skip
CAPACITY, ROWS = 256, 6  # tokens a packed row, rows a step: many small steps beat few large ones
WINDOW = (0.1, 0.9)  # alpha, beta: pass rates of reasoning tasks worth training on; the report gives no figures
DOMAINS = ("e-commerce", "general")
SHOP = {*ECOMMERCE, "page", "ledger", "shelf"}  # of the first domain; other conversations of data/tasks.py drill words and numbers
FULL = {"none": (), "e-commerce": DOMAINS[:1], "general": DOMAINS[1:], "all": DOMAINS}


def pack(lengths, capacity):
    """Best-fit decreasing: bins of sample indices, each at most `capacity` tokens; a million lengths take seconds.

    Longest first, every sample goes to the bin it fills best: the one with the least free space that suffices, found by bisection.
    Raises InputError (a ValueError) naming the index of a sample that is longer than capacity, or empty.
    """
    bins, sizes = [], [capacity]  # sizes: the free spaces to be had, ascending; a whole new bin always is
    having = [[] for _ in range(capacity)]  # having[free]: the bins with so much space
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not 0 < lengths[i] <= capacity:
            raise InputError(f"sample {i} has {lengths[i]} tokens; a packed row holds 1 to {capacity}")
        free = sizes[bisect.bisect_left(sizes, lengths[i])]
        if free == capacity:
            b = len(bins)
            bins.append([])
        else:
            b = having[free].pop()
            if not having[free]:
                sizes.remove(free)
        bins[b].append(i)
        if left := free - lengths[i]:
            if not having[left]:
                bisect.insort(sizes, left)
            having[left].append(b)
    return bins


def collate(samples, bins, capacity=CAPACITY):
    """Packed rows of samples [(ids, loss_mask), …]: tokens, targets, weights, doc_ids, positions, all (bins, capacity).

    weights is 1 where the target is to be learnt; doc_ids is -1 on padding; positions restart in each sample.
    """
    batch = assemble([[samples[i] for i in members] for members in bins], capacity)
    return tuple(batch[name] for name in ("tokens", "targets", "weights", "doc_ids", "positions"))


def length_buckets(lengths, tokens, rng, least=1, window=4096):
    """Batches of samples of like length, about `tokens` each once padded, but `least` samples or more: a random order, sorted within
    windows, cut, shuffled."""
    order, batches = list(range(len(lengths))), []
    rng.shuffle(order)
    for start in range(0, len(order), window):
        batch = []
        for i in sorted(order[start : start + window], key=lambda i: lengths[i]):
            if len(batch) >= least and (len(batch) + 1) * lengths[i] > tokens:
                batches.append(batch)
                batch = []
            batch.append(i)
        if len(batch) < least and batches:  # what is left over is filled up from the batch before, or joins it
            batch = batches.pop() + batch
            if len(batch) >= 2 * least:
                batches.append(batch[:-least])
                batch = batch[-least:]
        batches.append(batch)
    rng.shuffle(batches)
    return batches


@functools.lru_cache(maxsize=1)
def epoch_order(n, seed, epoch):
    """The numbers below n in the order in which an epoch takes them."""
    order = list(range(n))
    random.Random(f"{seed}-{epoch}").shuffle(order)
    return order


def chat_of(task, thinking):
    """The conversation a task teaches: its messages and the reference answer, with the thought when thinking."""
    answer = {"role": "assistant", "content": task["answer"]}
    if thinking:
        answer["think"] = task["think"]
    return [*task["messages"], answer]


def curriculum(stage, examples, seed):
    """[(task, thinking), …] of a stage. sft1 answers directly what needs no thought. pairs and drills take everything once, thinking
    where there is a thought. sft2 takes every task that has a thought, with it, and for each of them two tasks drawn from all, answered
    directly: they keep what sft1 learnt and teach the switch. Where nothing has a thought, sft2 goes over everything once more."""
    if stage in ("pairs", "drills"):
        return [(task, "think" in task) for task in examples]
    reasoning = [task for task in examples if "think" in task]
    if stage == "sft1":
        if reasoning:
            print(f"{stage}: {len(reasoning):,} of {len(examples):,} tasks have a thought and wait for sft2")
        if len(reasoning) == len(examples):
            raise InputError(f"{stage} needs tasks without a thought; all of these have one")
        return [(task, False) for task in examples if "think" not in task]
    resampled = random.Random(f"sft2-{seed}").sample(examples, k=min(len(examples), 2 * len(reasoning) or len(examples)))
    return [(task, True) for task in reasoning] + [(task, False) for task in resampled]


def pass_rates(model, tokenizer, examples, n=8, seed=0):
    """Share of n sampled thoughts that lead to an answer the scorer accepts, for each task (v2 §5.2)."""
    prompts = [tokenizer.encode_chat(task["messages"], thinking=True)[0] for task in examples]
    fits = [len(prompt) < model.config.max_seq_len for prompt in prompts]
    if not all(fits):
        print(f"{fits.count(False):,} prompts leave no room for an answer in a context of {model.config.max_seq_len}: rated 0")
    sampling = with_room(Sampling(temperature=1.0, top_k=0, top_p=1.0, max_tokens=96, seed=seed), tokenizer, examples)
    completions = iter(generate(model, tokenizer, [prompt for prompt, fit in zip(prompts, fits, strict=True) if fit], sampling, n))
    scored = [
        [fit and SCORERS[task["scorer"]](split_thought(next(completions).text)[1], task["answer"]) for _ in range(n)]
        for task, fit in zip(examples, fits, strict=True)
    ]
    return np.mean(scored, axis=1).tolist()


def decontaminated(examples, test):
    """The examples that are no near-duplicate (data/dedup.py) of a test task."""
    prompts = ("\n".join(message["content"] for message in task["messages"]) for task in [*test, *examples])
    clusters = near_duplicates(np.stack([signature(prompt) for prompt in prompts]))
    seen = {clusters.find(i) for i in range(len(test))}
    return [task for i, task in enumerate(examples, len(test)) if clusters.find(i) not in seen]


class Chats:
    """Encoded conversations; `batch(step)` is a pure function of (seed, step) and, where a step has few rows, of ranks and stages.

    packed: rows of CAPACITY tokens, filled by `pack`; if one conversation is longer, all rows are as wide as the longest and a step has
    fewer of them. Otherwise one conversation a row, in batches of like length, padded to the longest (Distributed Dynamic Padding).
    full: the domains ("e-commerce", "general") whose prompts are trained on too. ranks: a step has at least a row for each of so many;
    stages: of a pipeline, for whose micro-batches every rank has a multiple of so many rows.
    """

    def __init__(self, chats, tokenizer, context, seed, full=(), packed=True, ranks=1, stages=1):
        self.samples, self.domains, self.seed, self.packed = [], [], seed, packed
        for i, (task, thinking) in enumerate(chats):
            domain = DOMAINS[task.get("task") not in SHOP]
            ids, mask = tokenizer.encode_chat(chat_of(task, thinking), thinking=thinking, full_loss=domain in full)
            if len(ids) > context:
                print(f"sample {task.get('id', i)} has {len(ids)} tokens, more than the context {context}: left out")
                continue
            self.samples.append((np.array(ids, np.int32), np.array(mask, np.bool_)))  # lists would take eight times the memory
            self.domains.append(DOMAINS.index(domain))
        if not self.samples:
            raise InputError("no conversation fits the context")
        if full and not any(DOMAINS.index(name) in self.domains for name in full):
            raise InputError(f'no conversation is of the domain {full[0]}: field "task" says which, see data/tasks.py for the names')
        lengths = [len(ids) for ids, _ in self.samples]
        self.capacity = max(CAPACITY, -(-max(lengths) // 16) * 16)  # what up to eight cp ranks can cut
        multiple = ranks * stages if stages > 1 else 1
        self.units_per_step = -(-max(ranks, round(CAPACITY * ROWS / self.capacity)) // multiple) * multiple if packed else 1
        self.units = pack(lengths, self.capacity) if packed else length_buckets(lengths, CAPACITY * ROWS, random.Random(seed), ranks)
        places = sum(self.width(members) * (1 if packed else len(members)) for members in self.units)
        print(
            f"{len(self.samples):,} conversations in {len(self.units):,} {'packed rows' if packed else 'padded batches'}, "
            f"{100 * sum(lengths) / places:.1f} % filled; {len(chats) - len(self.samples)} over-long left out"
        )

    def width(self, members):
        """Places in each row of a unit. A padded batch can be cut by up to four cp ranks; the whole of it has one width, so that each
        rank, which makes it all before it takes its rows, need not ask the others."""
        return self.capacity if self.packed else -(-max(len(self.samples[i][0]) for i in members) // 8) * 8

    def batch(self, step):
        n, k = len(self.units), self.units_per_step
        chosen = [self.units[epoch_order(n, self.seed, i // n)[i % n]] for i in range(step * k, (step + 1) * k)]
        rows = chosen if self.packed else [[i] for i in chosen[0]]
        batch = assemble([[self.samples[i] for i in members] for members in rows], self.width(chosen[0]))
        most = max(map(len, rows))
        domain_of_doc = torch.tensor([[self.domains[i] for i in members] + [0] * (most - len(members)) for members in rows])
        return [{**batch, "domains": domain_of_doc.gather(1, batch["doc_ids"].clamp_min(0))}]


def sft_loss(model, batch):
    """The language model's loss, and what each domain adds to it: lm_x / share_x is the mean loss of x's supervised tokens."""
    losses = losses_of(model, batch)
    metrics, weights_BT = logged(losses), batch["weights"] / batch["weights"].sum().clamp_min(1e-9)
    for domain, name in enumerate(DOMAINS):
        here_BT = weights_BT * (batch["domains"] == domain)
        metrics.update({f"lm_{name}": (losses.nll_BT * here_BT).sum(), f"share_{name}": here_BT.sum()})
    return losses.total, metrics


def selected_thoughts(stage, examples, args, device):
    """The examples without those reasoning tasks that resemble a held-out one or, given --rollouts, are too hard or too easy."""
    direct, reasoning = ([task for task in examples if ("think" in task) == thinks] for thinks in (False, True))
    clean = decontaminated(reasoning, tasks("test", 0, 10)) if reasoning else []
    if len(clean) < len(reasoning):
        print(f"{stage}: {len(reasoning) - len(clean):,} reasoning tasks resemble held-out ones and are left out")
    if args.rollouts and clean:
        rates = pass_rates(*load_for_inference(args.rollouts, device), clean, seed=args.seed)
        kept = [task for task, rate in zip(clean, rates, strict=True) if WINDOW[0] <= rate <= WINDOW[1]]
        hard, easy = sum(rate < WINDOW[0] for rate in rates), sum(rate > WINDOW[1] for rate in rates)
        print(f"{stage}: {hard:,} of {len(clean):,} reasoning tasks too hard, {easy:,} too easy for {args.rollouts}; {len(kept):,} stay")
        clean = kept
    return direct + clean


def stage_before(stage, run):
    """The stage that a stage of tuning starts from."""
    *others, last = STAGES[stage][0]
    return next((before for before in others if checkpoints(run, before)), last)


def run_stage(stage, args, device, tokenizer, ranks=None):
    before = stage_before(stage, args.run)
    state = load_latest(args.run, before, weights=ranks is None)
    inherit(state, tokenizer, to_train=True)
    schedule = stage_schedule(stage, args, STAGES[stage][1], state["origin"])
    if schedule is None:
        return
    if args.data:
        examples = read_tasks(args.data)
    else:
        exercises = EXERCISES[f"{stage} after drills" if before == "drills" else stage]
        examples = training(args.seed, min(MOST, PER_STEP * schedule.steps), *exercises)
    if stage != "sft1":
        examples = selected_thoughts(stage, examples, args, device)
    if not examples:
        raise InputError(f"{stage}: no task is left to train on")
    stages = ranks.layout.pp if ranks is not None else 1
    if stages > 1 and args.batching == "padded":
        raise InputError("--batching padded makes batches of any number of rows, which a pipeline cannot cut: pack them, or leave pp at 1")
    model = model_from(state, ranks, device)
    chats = Chats(
        curriculum(stage, examples, args.seed), tokenizer, model.config.max_seq_len, args.seed, FULL[args.full], args.batching == "packed",
        model.ranks.count, stages,
    )  # fmt: skip
    fit_stage(model, chats.batch, sft_loss, for_width(schedule, model.config), stage, args, tokenizer)


def main():
    args = cli.parse(
        __doc__, "data", "run", "stage", "steps", "resume", "device", "seed", "parallel",
        data=dict(help="task file .jsonl: {messages, answer, think?} (default: the embedded tasks)"),
        stage=dict(default="all", choices=("all", *STAGES), help="all: sft1 and sft2; pairs and drills only by name"),
        full=dict(default="none", choices=tuple(FULL), help="domain whose prompts are trained on too (v3's mixed loss: e-commerce)"),
        batching=dict(default="packed", choices=("packed", "padded"), help="pack conversations into rows, or pad batches of like length"),
        rollouts=dict(help="run whose last model tries each reasoning task; all stages but sft1 keep those it solves now and then"),
    )  # fmt: skip
    stages = ["sft1", "sft2"] if args.stage == "all" else [args.stage]
    before = stage_before(stages[0], args.run)
    device, ranks = processes(args, lambda: CompassConfig(**load_latest(args.run, before, weights=False)["config"]))
    tokenizer = Tokenizer.load(args.run)
    torch.manual_seed(args.seed)
    for stage in stages:
        run_stage(stage, args, device, tokenizer, ranks)


if __name__ == "__main__":
    cli.run(main)
