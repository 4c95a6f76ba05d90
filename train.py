"""Pre-training: `fit`, the one training loop, the three stages general, anneal, long (v2 §2.3) and v3's six.

general learns from everything under a cosine; anneal warms up again, on the cleanest text; long stretches the
context with a larger RoPE base (ABF) on a mix of short and long documents. The global batch is a
pure function of (seed, step), so a killed run resumes on the same curve, bit for bit.

Shapes: B rows, T tokens. A batch is a dict of (B, T) tensors: tokens, targets (already shifted), weights (0 where
a target does not count), doc_ids (-1 is padding), positions (restart in each document).

    python train.py                                                  # laptop: all stages of `tiny`
    python train.py --config small --data /corpus --run runs/small   # GPU: the same stages, bigger numbers
    torchrun --nproc-per-node 8 -- train.py --config small --data shards --run runs/small --parallel ep=8   # a node: see parallel.py
"""

import contextlib
import dataclasses
import json
import math
import os
import signal
import time
import zlib

import numpy as np
import torch
from tqdm import tqdm

import cli
from checkpoint import begun, changed_fields, inherit, load_latest, load_model, load_weights, prune, rewind_metrics, save_checkpoint
from cli import InputError
from compass import CONFIGS, Compass, CompassConfig, config_named
from data import reader
from data.shards import Shards, is_shards
from recipes import RECIPES, lr_at
from recipes import Schedule as Schedule  # sft, dpo and others take it from here
from tokenizer import Tokenizer

BETA1, WEIGHT_DECAY, CLIP = 0.9, 0.1, 1.0
MAX_BAD_STEPS = 10  # non-finite steps in a row before giving up


def assemble(rows, length):
    """Rows of [(ids, mask), …] to one batch of width `length`; mask[i] = 1 when ids[i] is to be predicted."""
    B = len(rows)
    tokens, targets = np.zeros((B, length), np.int64), np.zeros((B, length), np.int64)
    weights, positions = np.zeros((B, length), np.float32), np.zeros((B, length), np.int64)
    doc_ids = np.full((B, length), -1, np.int64)
    for b, row in enumerate(rows):
        at = 0
        for doc, (ids, mask) in enumerate(row):
            end = at + len(ids)
            if end > length:
                raise InputError(f"row {b} of a batch holds more than its {length} tokens")
            tokens[b, at:end], doc_ids[b, at:end], positions[b, at:end] = ids, doc, np.arange(len(ids))
            # the last token of a document has no target, so no document's first token is ever predicted
            targets[b, at : end - 1], weights[b, at : end - 1] = ids[1:], mask[1:]
            at = end
    arrays = dict(tokens=tokens, targets=targets, weights=weights, doc_ids=doc_ids, positions=positions)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class Tokenised:
    """Documents tokenised into memory: `lengths` (N,) with the end token, `document(i)` its ids. data.shards.Shards is its mapped twin."""

    def __init__(self, documents, tokenizer):
        texts = [document["text"] for document in documents]
        if not texts:
            raise InputError("the corpus holds no training document")
        encoded, end = tokenizer.encoding.encode_ordinary_batch(texts, num_threads=2), tokenizer.special["<|endoftext|>"]
        self.documents = [np.array([*ids, end], np.uint32) for ids in encoded]
        self.lengths = np.array([len(ids) for ids in self.documents])

    def document(self, i):
        return self.documents[i]


class TokenRows:
    """Documents shuffled each epoch, joined, and cut into rows of `length` tokens; row i is a pure function of (documents, seed, i)."""

    def __init__(self, tokenised, length, seed):
        self.tokenised, self.lengths, self.total = tokenised, tokenised.lengths, int(tokenised.lengths.sum())
        self.length, self.seed, self.epoch = length, seed, None
        self.rows_per_epoch = self.total // length
        if not self.rows_per_epoch:
            raise InputError(f"the corpus has {self.total} tokens, fewer than one row of {length}: give more text")

    def row(self, i):
        """[(ids, mask), …] of row i."""
        epoch, at = i // self.rows_per_epoch, i % self.rows_per_epoch * self.length
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.lengths))
            self.ends = np.cumsum(self.lengths[self.order])
        pieces, stop = [], at + self.length
        while at < stop:
            k = np.searchsorted(self.ends, at, side="right")
            doc, skip = self.order[k], at - (self.ends[k] - self.lengths[self.order[k]])
            ids = self.tokenised.document(doc)[skip : skip + stop - at]
            pieces.append((ids, np.ones(len(ids))))
            at += len(ids)
        return pieces

    def batches(self, rows, micro_rows):
        """The function of step that `fit` wants: the global batch as a list of micro-batches."""
        parts = [range(rows)[at : at + micro_rows] for at in range(0, rows, micro_rows)]
        return lambda step: [assemble([self.row(step * rows + i) for i in part], self.length) for part in parts]


def losses_of(model, batch):
    """compass.Losses of a batch."""
    return model.loss(batch["tokens"], batch["targets"], batch["weights"], doc_ids_BT=batch["doc_ids"], positions_BT=batch["positions"])


def logged(losses):
    """What of the losses goes into metrics.jsonl."""
    return {**{name: getattr(losses, name) for name in ("lm", "aux", "z", "mtp")}, "load": losses.load_LE}


def language_model_loss(model, batch):
    """The loss function of pre-training, for `fit`."""
    losses = losses_of(model, batch)
    return losses.total, logged(losses)


def make_optimizer(model, beta2=0.95):
    """AdamW with weight decay on matrices only."""
    groups = {}  # what is updated in one go lies on one mesh; a single process has none
    for p in sorted(model.parameters(), key=lambda p: p.dim() < 2):
        decay = WEIGHT_DECAY if p.dim() >= 2 else 0.0
        groups.setdefault((decay, getattr(p, "device_mesh", None)), {"params": [], "weight_decay": decay})["params"].append(p)
    return torch.optim.AdamW(list(groups.values()), lr=0.0, betas=(BETA1, beta2), fused=True)


@contextlib.contextmanager
def _sigterm():
    """A list that SIGTERM adds to, so that the step in progress can end and be saved."""
    asked = []
    previous = signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, previous)


def _train_step(model, optimizer, micro_batches, loss_fn, lr, device):
    """One optimizer step on this rank's micro-batches. Micro-losses are weighed by their share of the global weight: one
    denominator over all micro-batches of all ranks."""
    ranks = model.ranks
    weights = [batch["weights"].sum().item() for batch in micro_batches]
    total = ranks.sum(torch.tensor(sum(weights), dtype=torch.float64, device=device)).item()
    if total <= 0:
        raise InputError("a batch has no supervised token (every target has weight 0)")
    weights = [max(weight, 1e-9) for weight in weights]  # a rank without targets still balances its experts
    optimizer.zero_grad(set_to_none=True)
    if ranks.several and ranks.layout.pp > 1:
        loss, metrics = model.accumulate(micro_batches, total, loss_fn, device)
    else:
        loss, metrics = _accumulate(model, micro_batches, [weight / total for weight in weights], loss_fn, device)
    loss = ranks.sum(loss).item()
    metrics = {name: ranks.sum(value) for name, value in metrics.items()}
    norm = ranks.clip(model.parameters(), CLIP).item()
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    return loss, norm, finite, {name: value.tolist() for name, value in metrics.items()}


def precision(model, device):
    """bf16 products on a GPU; where many ranks share a model, FSDP gathers its weights in bf16 and nothing is to be cast."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda" and not model.ranks.several)


def _accumulate(model, micro_batches, shares, loss_fn, device):
    """Forward and backward of the micro-batches, each weighed by its share: (loss, {metric: tensor})."""
    loss, metrics = torch.zeros((), dtype=torch.float64, device=device), {}
    for batch, share in zip(micro_batches, shares, strict=True):
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        with precision(model, device):
            micro_loss, micro_metrics = loss_fn(model, batch)
        (micro_loss * share).backward()
        loss += micro_loss.detach() * share
        for name, value in micro_metrics.items():
            metrics[name] = metrics.get(name, 0.0) + value.detach() * share
    return loss, metrics


def first_row(batch):
    """A checksum of the first row alone, as more ranks may take more rows a step: its tokens, and which of them are trained on."""
    row_T2 = torch.stack((batch["tokens"], batch.get("mask", batch["weights"])), dim=-1)[0][batch["doc_ids"][0] >= 0]
    return zlib.crc32(row_T2.numpy().tobytes())


def _restore(model, optimizer, run, stage, tokenizer_hash, data):
    """Bring model and optimizer to where the stage's newest intact checkpoint stands, and return that step."""
    state = load_latest(run, stage, weights=not model.ranks.several)
    changed = changed_fields(state["config"], model.config)
    if state["tokenizer_hash"] != tokenizer_hash:
        changed.append(f"tokenizer {state['tokenizer_hash'][:12]}, now {tokenizer_hash[:12]}")
    if changed:
        raise InputError(f"{stage} was begun otherwise ({'; '.join(changed)}): it cannot be resumed so")
    if state.get("data") not in (None, data):
        raise InputError(f"{run}/{stage} was begun on other data (its first row differs): give it as then, or name another --run")
    if model.ranks.several:
        import resharding

        resharding.restore(state["path"], model, optimizer)
    elif state["optimizer"] is None:
        raise InputError(f"{run}/{stage} holds weights only, as exports do: it cannot be resumed, only built on")
    else:
        load_weights(model, state)
        for name, p in model.named_parameters():
            optimizer.state[p] = {kind: x.to(p.device) for kind, x in state["optimizer"][name].items()}
    print(f"{stage}: resumed at step {state['step']}")
    return state["step"]


def _collapse(load, config):
    """What to say where an expert gets nearly all that one can; load: each layer's shares of assignments by expert."""
    collapsed = max(map(max, load)) > max(0.8 / config.top_k, 1.5 / config.n_experts)
    return "router collapse: one expert takes over 80 % of the tokens" if collapsed else None


def fit(model, batches, loss_fn, schedule, *, run, stage, tokenizer_hash="", seed=0, resume=False, save_every=200, watch=None):
    """Train `model` in place and leave <run>/<stage>/step_N.pt and metrics.jsonl behind.

    batches(step) -> list of micro-batches (dicts of CPU tensors with "weights"); it must be a pure function of the step, and a stage is
    not resumed on other data. loss_fn(model, batch) -> (scalar loss, {name: tensor to log}). A step with a non-finite loss or
    gradient is skipped and counted; MAX_BAD_STEPS in a row, or nothing else, raise InputError. SIGTERM saves and exits 0.
    watch(metrics of a step) -> a warning to log and say once, or None. A model that parallel.py made is trained by all its ranks:
    every one calls fit, takes its rows of each batch and saves its shards; the first one writes log and bar.
    """
    ranks, device, optimizer = model.ranks, next(model.parameters()).device, make_optimizer(model, schedule.beta2)
    if ranks.several:
        from resharding import save_shards as save  # takes a second, which a single process need not wait for
    else:
        save = save_checkpoint
    data = first_row(batches(0)[0])
    start = _restore(model, optimizer, run, stage, tokenizer_hash, data) if begun(run, stage, resume) else 0
    known = dict(planned=schedule.steps, stage=stage, base=schedule.base, tokenizer_hash=tokenizer_hash, seed=seed, data=data)
    if ranks.writes:
        rewind_metrics(run, stage, start)
    model.train()
    bad, said = 0, set()
    bar = tqdm(range(start, schedule.steps), initial=start, total=schedule.steps, desc=stage, unit="step", mininterval=1,
               disable=not ranks.writes)  # fmt: skip
    log_path = os.path.join(run, "metrics.jsonl") if ranks.writes else os.devnull
    with _sigterm() as asked, open(log_path, "a", encoding="utf-8") as log, bar:
        for step in bar:
            began = time.perf_counter()
            model.mtp_scale = float(schedule.mtp_every > 0 and step % schedule.mtp_every == 0)
            model.router_scale = np.interp(step, (0, max(1, schedule.steps - 1)), schedule.router).item()
            micro_batches, lr = batches(step), lr_at(step, schedule)
            mine = [ranks.take(batch) for batch in micro_batches]
            loss, norm, finite, metrics = _train_step(model, optimizer, mine, loss_fn, lr, device)
            tokens = sum((batch["doc_ids"] >= 0).sum().item() for batch in micro_batches)
            speed = tokens / (time.perf_counter() - began)
            entry = {"stage": stage, "step": step, "loss": loss, "lr": lr, "grad_norm": norm, "tokens": tokens,
                     "tokens_per_s": round(speed)}  # fmt: skip
            load = metrics.pop("load", None)
            if load is not None:
                entry["max_load"] = max(map(max, load))
                if step + 1 == schedule.steps:
                    entry["load"] = load
            warnings = {"router": load and _collapse(load, model.config), "watch": watch and finite and watch(metrics)}
            for kind, warning in warnings.items():
                if warning:
                    entry["warning"] = warning
                    if kind not in said and (kind == "watch" or step >= schedule.warmup):  # while warming up, collapses come and go
                        bar.write(f"{stage} step {step}: {warning} (said once; see metrics.jsonl)")
                        said.add(kind)
            bad = 0 if finite else bad + 1
            if bad:
                entry.update(loss=None, grad_norm=None, skipped="non-finite loss or gradient")
                metrics = {}
                bar.write(f"{stage} step {step}: non-finite loss or gradient, step skipped ({bad} in a row)")
            log.write(json.dumps({**entry, **metrics}) + "\n")
            log.flush()
            bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tok/s")
            if bad == min(MAX_BAD_STEPS, schedule.steps):
                raise InputError(f"{stage}: {bad} non-finite steps in a row, the last at step {step} (batch {step} of seed {seed})")
            done = step + 1
            stopping = ranks.agree(bool(asked))
            if done % save_every == 0 or done == schedule.steps or stopping:
                save(os.path.join(run, stage, f"step_{done}.pt"), model, optimizer=optimizer, step=done, **known)
                if ranks.writes:
                    prune(run, stage)
            if stopping:
                bar.write(f"{stage}: SIGTERM, saved at step {done}; go on with --resume")
                raise SystemExit(0)
        if ranks.agree(bool(asked)):  # while the stage was saved for the last time
            raise SystemExit(0)
    return model


def fit_stage(model, batches, loss_fn, schedule, stage, args, tokenizer, watch=None):
    """`fit` with run, seed and resume as the flags say."""
    given = dict(run=args.run, seed=args.seed, resume=args.resume, watch=watch)
    return fit(model, batches, loss_fn, schedule, stage=stage, tokenizer_hash=tokenizer.hash, **given)


def for_width(schedule, config):
    """A schedule of tuning, made for `tiny`, for a wider model: rates fall as 1/width (our choice; the reports say nothing)."""
    scale = min(1.0, CONFIGS["tiny"].dim / config.dim)
    return schedule._replace(peak=scale * schedule.peak, final=scale * schedule.final)


def stage_schedule(stage, args, schedule, base=""):
    """The schedule under --steps, for a start from the stage `base`; None where --resume finds the stage finished, which is said aloud.

    Raises InputError where the stage has begun and is not to be resumed, or was begun with other steps, another seed or from another stage.
    """
    names, plain = ("beta", "weights", "full", "batching"), (None, "none", "packed")  # what a stage is trained for, unless as always
    settings = (f", --{name} {value}" for name in names if (value := getattr(args, name, None)) not in plain)
    schedule = schedule._replace(base=base + "".join(settings))
    if args.steps:
        schedule = schedule._replace(steps=args.steps, warmup=min(schedule.warmup, args.steps // 10))
    if begun(args.run, stage, args.resume):
        state = load_latest(args.run, stage, weights=False)
        steps, seed = state.get("planned") or schedule.steps, state["seed"]  # exports do not know what was planned
        if (steps, seed) != (schedule.steps, args.seed):
            raise InputError(
                f"{args.run}/{stage} was begun with {steps} steps and seed {seed}, not {schedule.steps} and {args.seed}: "
                f"say --steps and --seed as then, or name another --run"
            )
        if (begun_from := state.get("base") or schedule.base) != schedule.base:
            raise InputError(
                f"{args.run}/{stage} was begun from {begun_from}, and now it would be from {schedule.base}: delete {args.run}/{stage} to "
                f"train it anew, or name another --run"
            )
        if state["step"] >= schedule.steps:
            print(f"{stage}: already finished")
            return None
    return schedule


def processes(args, config_of):
    """(device, parallel.Ranks), or (device, None) for a process that torchrun did not start. config_of() is the model's config."""
    if args.parallel or "LOCAL_RANK" in os.environ:
        from parallel import start

        return start(args.parallel, config_of, args.device)
    return cli.pick_device(args.device), None


def model_from(state, ranks, device, recompute=False, **changes):
    """The model that a stage left behind, from its `load_latest`; some fields of the config may be changed."""
    if ranks is None:
        return load_model(state, device, **changes)
    import resharding
    from parallel import build

    model = build(CompassConfig(**{**state["config"], **changes}), ranks, device, recompute)
    resharding.restore(state["path"], model)
    return model


def run_stage(stage, args, device, tokenizer, ranks=None):
    """Train one stage of the config's recipe, starting from the stage before it."""
    stages = list(RECIPES[args.config])
    if stage not in stages:
        raise InputError(f"--stage {stage} is not one of {', '.join(stages)} of --config {args.config}")
    recipe, config = RECIPES[args.config][stage], config_named(args.config)
    before = stages[stages.index(stage) - 1] if stage != stages[0] else None
    if before is None:
        if tokenizer.n_vocab > config.vocab_size:
            raise InputError(f"the tokenizer has {tokenizer.n_vocab} tokens, config {args.config} only {config.vocab_size}")
    else:
        state = load_latest(args.run, before, weights=ranks is None)
        inherit(state, tokenizer, to_train=True)
        own = dict(max_seq_len=state["config"]["max_seq_len"], rope_base=state["config"]["rope_base"])  # change from stage to stage
        if changed := changed_fields(state["config"], dataclasses.replace(config, **own)):
            raise InputError(f"{args.run}/{before} is not of --config {args.config} ({'; '.join(changed)}): say --config as then")
    schedule = stage_schedule(stage, args, recipe.schedule, state["origin"] if before else "")
    if schedule is None:
        return
    torch.manual_seed(args.seed)
    if before is None and ranks is None:
        with device:
            model = Compass(config)
    elif before is None:
        from parallel import build, initialise

        model = initialise(build(config, ranks, device, recipe.recompute), args.seed)
    else:
        model = model_from(state, ranks, device, recipe.recompute, max_seq_len=recipe.seq_len, rope_base=recipe.rope_base)
    texts = Shards(args.data, tokenizer) if is_shards(args.data) else Tokenised(reader.documents(args.data, stage, args.seed), tokenizer)
    # the marketplace writes every stage its own text; of a folder that stages share, each draws its own order
    rows = TokenRows(texts, recipe.seq_len, args.seed if args.data is None else zlib.crc32(f"{stage} {args.seed}".encode()))
    print(
        f"{stage}: {len(rows.lengths):,} documents, {rows.total:,} tokens; {schedule.steps} steps of "
        f"{recipe.rows} x {recipe.seq_len} tokens ({schedule.steps * recipe.rows * recipe.seq_len / rows.total:.2f} epochs)"
    )
    batches = rows.batches(recipe.rows, recipe.micro_rows * model.ranks.count)
    fit_stage(model, batches, language_model_loss, schedule, stage, args, tokenizer)


def main():
    args = cli.parse(
        __doc__, "config", "data", "run", "stage", "steps", "resume", "device", "seed", "parallel",
        data=dict(help="folder of .txt/.jsonl files, or of shards that data.shards made (default: the embedded marketplace)"),
        stage=dict(default="all", help="a stage of the config's recipe: general, anneal, long; v3 has its own six (default: all)"),
    )  # fmt: skip
    config = config_named(args.config)
    device, ranks = processes(args, lambda: config)
    tokenizer = Tokenizer.load(args.run)
    for stage in RECIPES[args.config] if args.stage == "all" else (args.stage,):
        run_stage(stage, args, device, tokenizer, ranks)


if __name__ == "__main__":
    cli.run(main)
