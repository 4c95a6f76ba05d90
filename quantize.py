"""Quantization after training: round-to-nearest and AWQ in 4 bits, FP8 in 8, calibrated expert by expert (v2 §6.3; v3's expert-aware FP8).

A weight matrix W is stored as small integers or as e4m3 numbers (lowbit.py says how). What hurts is not the weight's error but the
output's, and a few inputs are much larger than the rest. So inputs are multiplied by c and W's columns divided by c, which changes nothing
in exact arithmetic, and c is chosen by the output error on calibration tokens: AWQ tries c = (mean |x|)^-alpha and then clips ranges; FP8
tries SmoothQuant's c = max|W|^(1-alpha) / max|x|^alpha. No scaling is always among the candidates. Each expert is calibrated on the tokens
routed to it. Where the router sends an expert few of them, `oversample` picks further texts until every expert has seen MINIMUM.

The c of qkv, out and gate_up stay explicit and multiply the (sorted) inputs: the norm before the experts feeds the router too, so
that c cannot go there without touching it. Only the c of down folds, into the rows of up. Router, head, embedding, norms and MTP
blocks are left as they are, bit for bit.

Shapes: E matrices in one tensor (a layer's experts; 1 for a plain linear layer), F outputs, D inputs, J = D / group, R rows sorted by
expert, N calibration rows of one matrix, L layers, P batches to choose from.

    python quantize.py                              # runs/demo -> runs/demo-awq, which generate.py and evaluate.py load by --run
    python quantize.py --run runs/demo --method fp8 --device cuda
"""

import heapq
import itertools
import json
import math
import os
import random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

import checkpoint
import cli
from cli import InputError
from compass import rope_table
from data import reader
from data.tasks import training
from kernels import count_assignments, quantise_rows
from lowbit import FP8Linear, Int4Linear, dequantize_fp8, dequantize_int4, quantize_fp8, quantize_int4, with_quantized
from sft import chat_of
from tokenizer import Tokenizer

METHODS = ("awq", "rtn", "fp8", "fp8-naive")
GROUP = 128  # inputs that share a scale and a zero; AWQ's usual choice (the report gives none). Narrower layers: what divides them
ALPHAS = [i / 20 for i in range(20)]
CLIPS = [1 - i / 20 for i in range(11)]  # shares of a group's range, down to a half
MINIMUM, ROWS = 512, 2048  # tokens that every expert should have seen; rows at most that a search looks at (with 512 it overfits)
FIRST, POOL = 128, 512  # batches that calibrate in any case, and among how many `oversample` may choose


class Found(NamedTuple):
    """One quantized matrix: tensors, input scale c (D,), relative output errors |dy| / |y| of plain rounding and of what was chosen."""

    tensors: dict
    c_D: torch.Tensor
    alpha: float
    before: float
    after: float


def input_scales(weight_FD, x_ND, method):
    """[(alpha, c_D), …] to try, no scaling first; c is rounded to bf16, in which it is stored."""
    found = [(0.0, torch.ones_like(weight_FD[0]))]
    if method in ("rtn", "fp8-naive"):
        return found
    for alpha in ALPHAS[1:]:
        if method == "awq":  # v2 §6.3: protects the columns that meet large activations
            c_D = x_ND.abs().mean(0).clamp(min=1e-5) ** -alpha
        else:  # SmoothQuant: splits the outliers between activations and weights
            c_D = weight_FD.abs().amax(0).clamp(min=1e-5) ** (1 - alpha) / x_ND.abs().amax(0).clamp(min=1e-5) ** alpha
        found.append((alpha, (c_D / (c_D.max() * c_D.min()).sqrt()).bfloat16().float()))
    return found


def round_weight(weight_FD, method, group, clip=1.0):
    """({name: stored tensor}, the numbers they stand for)."""
    if method.startswith("fp8"):
        weight_fp8, scale = quantize_fp8(weight_FD)
        return {"weight_fp8": weight_fp8, "weight_scale": scale}, dequantize_fp8(weight_fp8, scale)
    qweight, scales, zeros = quantize_int4(weight_FD, group, clip)
    return {"qweight": qweight, "scales": scales.bfloat16(), "zeros": zeros.to(torch.uint8)}, dequantize_int4(qweight, scales, zeros)


def row_errors(weight_FD, rounded_FD, x_ND, method):
    """Squared error of each output, summed over the rows of x; fp8 rounds x as well."""
    approximate_ND = dequantize_fp8(*quantise_rows(x_ND)) if method.startswith("fp8") else x_ND
    return (approximate_ND @ rounded_FD.T - x_ND @ weight_FD.T).square().sum(0)


def best_clips(weight_FD, x_ND, group):
    """(F, J) shares of each group's range, by the output error of the group alone; ones where an output as a whole does not gain."""
    x_NJG = x_ND.unflatten(1, (-1, group))
    gram_JGG = torch.einsum("njg,njh->jgh", x_NJG, x_NJG)
    errors = []
    for share in CLIPS:
        delta_FJG = (round_weight(weight_FD, "awq", group, share)[1] - weight_FD).unflatten(1, (-1, group))
        errors.append((torch.einsum("fjg,jgh->fjh", delta_FJG, gram_JGG) * delta_FJG).sum(-1))
    clip_FJ = torch.tensor(CLIPS, device=x_ND.device)[torch.stack(errors).argmin(0)]
    clipped_F, plain_F = (row_errors(weight_FD, round_weight(weight_FD, "awq", group, clip)[1], x_ND, "awq") for clip in (clip_FJ, 1.0))
    return torch.where((clipped_F < plain_F).unsqueeze(-1), clip_FJ, 1.0)


def quantize_matrix(weight_FD, x_ND, method, group, unclipped=0):
    """Search c, then (AWQ) clips of all outputs but the first `unclipped`, by the output error on x; return Found. Never worse on x
    than rounding alone."""
    weight_FD, x_ND, tried = weight_FD.float(), x_ND.float(), []
    group = math.gcd(group, weight_FD.shape[1])
    for alpha, c_D in input_scales(weight_FD, x_ND, method):
        scaled_FD = weight_FD / c_D
        error = row_errors(scaled_FD, round_weight(scaled_FD, method, group)[1], x_ND * c_D, method).sum().item()
        tried.append((error, alpha, c_D))
    _, alpha, c_D = min(tried)
    scaled_FD, scaled_ND = weight_FD / c_D, x_ND * c_D
    clip = 1.0
    if method == "awq":
        clip = best_clips(scaled_FD, scaled_ND, group)
        clip[:unclipped] = 1
    tensors, rounded_FD = round_weight(scaled_FD, method, group, clip)
    after = row_errors(scaled_FD, rounded_FD, scaled_ND, method).sum().item()
    size = (x_ND @ weight_FD.T).square().sum().clamp(min=1e-30).item()
    return Found(tensors, c_D, alpha, (tried[0][0] / size) ** 0.5, (after / size) ** 0.5)


def quantize_swiglu(gate_up_2FD, down_DF, x_ND, method, group):
    """(Found of gate_up, Found of down): down first, on the fp32 hidden rows; its c then folds into the rows of up."""
    gate_NF, up_NF = (x_ND @ gate_up_2FD.T).chunk(2, dim=-1)
    down = quantize_matrix(down_DF, F.silu(gate_NF) * up_NF, method, group)
    gate_FD, up_FD = gate_up_2FD.chunk(2)
    return quantize_matrix(torch.cat((gate_FD, up_FD * down.c_D.unsqueeze(1))), x_ND, method, group), down


def stack(found, folded=False):
    """The module of E quantized matrices. Without any scaling, or where c is folded elsewhere, it stores no input scale."""
    tensors = {name: torch.stack([f.tensors[name] for f in found]) for name in found[0].tensors}
    if not folded and any(f.alpha for f in found):
        tensors["input_scale"] = torch.stack([f.c_D for f in found]).bfloat16()
    return (FP8Linear if "weight_fp8" in tensors else Int4Linear)(**tensors)


def layer_inputs(block, hidden, ropes):
    """Run a block on every batch: (outputs, {"qkv", "out", "feed_forward": rows that went in}, index_NK of the router)."""
    seen, hooks = {}, []
    for name, module in (("qkv", block.attention.qkv), ("out", block.attention.out), ("feed_forward", block.feed_forward)):
        kept = seen[name] = []
        hooks.append(module.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0].flatten(0, -2))))
    results = [block(x_BTD, rope, None) for x_BTD, rope in zip(hidden, ropes, strict=True)]
    for hook in hooks:
        hook.remove()
    return [x for x, _ in results], {name: torch.cat(rows) for name, rows in seen.items()}, torch.cat([index for _, (_, index) in results])


def quantize_layer(block, inputs, index_NK, method, group, generator):
    """({module name: module}, report entries) of one block. An expert with fewer than MINIMUM tokens of its own is lent those of others."""
    weights, report, moe = {}, [], block.feed_forward

    def some(rows):
        """ROWS of the rows, at random."""
        return rows[torch.randperm(len(rows), generator=generator)[:ROWS].to(rows.device)]

    def note(expert, tokens, used, **found):
        for matrix, f in found.items():
            errors = {"alpha": f.alpha, "before": f.before, "after": f.after}
            report.append({"matrix": matrix, "expert": expert, "tokens": tokens, "calibrated_on": used, **errors})

    attention = block.attention
    # clipping shrinks the largest queries and keys, and what counts is their product: AWQ's authors leave both unclipped as well
    for name, linear, unclipped in (("qkv", attention.qkv, (attention.H + attention.G) * attention.C), ("out", attention.out, 0)):
        x_ND = some(inputs[name])
        found = quantize_matrix(linear.weight, x_ND, method, group, unclipped)
        weights[f"attention.{name}"] = stack([found])
        note(None, len(inputs[name]), len(x_ND), **{name: found})
    x_ND, pairs = inputs["feed_forward"], []
    for e, (gate_up_D2F, down_FD) in enumerate(zip(moe.gate_up_ED2F, moe.down_EFD, strict=True)):
        routed_N = (index_NK == e).any(1)
        own, others = some(x_ND[routed_N]), some(x_ND[~routed_N])
        chosen = torch.cat((own, others[: max(0, MINIMUM - len(own))]))
        pairs.append(quantize_swiglu(gate_up_D2F.float().T, down_FD.float().T, chosen.float(), method, group))
        note(str(e), int(routed_N.sum()), len(chosen), gate_up=pairs[-1][0], down=pairs[-1][1])
    weights["feed_forward.gate_up"], weights["feed_forward.down"] = stack([p[0] for p in pairs]), stack([p[1] for p in pairs], folded=True)
    if moe.shared is not None:
        chosen = some(x_ND)
        pair = quantize_swiglu(moe.shared.gate_up.weight.float(), moe.shared.down.weight.float(), chosen.float(), method, group)
        weights["feed_forward.shared.gate_up"], weights["feed_forward.shared.down"] = stack(pair[:1]), stack(pair[1:], folded=True)
        note("shared", len(x_ND), len(chosen), gate_up=pair[0], down=pair[1])
    return weights, report


@torch.no_grad()
def quantize_model(model, calibration, method="awq", group=GROUP, seed=0):
    """A quantized copy of a Compass, in eval mode, that shares the tensors it leaves alone; its `report` lists every matrix.

    calibration: token batches (B, T), int64, without padding; the model runs on them in full precision, layer by layer. method: "awq",
    "rtn" (int4, no search), "fp8" (W8A8, smoothed) or "fp8-naive" (no smoothing). A report entry: layer, matrix, expert ("0", "1", …
    "shared", or None: attention), tokens seen, rows calibrated on, alpha, relative output errors before (rounding alone) and after the
    search. Raises InputError on an unknown method, a group that is no power of two from 32 on, no batches, or a token outside the
    vocabulary.
    """
    if method not in METHODS:
        raise InputError(f"method {method!r} is not one of {', '.join(METHODS)}")
    if not method.startswith("fp8") and (group < 32 or group & (group - 1)):
        raise InputError(f"groups of {group} inputs: must be a power of two and at least 32, which the kernels take")
    if not calibration:
        raise InputError("no calibration batches: the quantizer must see some tokens")
    for i, tokens_BT in enumerate(calibration):
        if tokens_BT.dim() != 2 or not tokens_BT.numel() or not 0 <= tokens_BT.min() <= tokens_BT.max() < model.config.vocab_size:
            raise InputError(f"calibration batch {i}: need (rows, tokens) of ids 0..{model.config.vocab_size - 1}")
    c, device, generator = model.config, model.embedding.weight.device, torch.Generator().manual_seed(seed)
    hidden = [model.embedding(tokens_BT.to(device)) for tokens_BT in calibration]
    ropes = [rope_table(torch.arange(x.shape[1], device=device).unsqueeze(0), c.head_dim, c.rope_base) for x in hidden]
    weights, report = {}, []
    for i, block in enumerate(tqdm(model.blocks, desc=f"quantize {method}", unit="layer")):
        hidden, inputs, index_NK = layer_inputs(block, hidden, ropes)
        if not all(x.isfinite().all() for x in hidden):
            raise InputError(f"layer {i} gives states that are not finite: the checkpoint is damaged or training diverged")
        quantized, entries = quantize_layer(block, inputs, index_NK, method, group, generator)
        weights |= {f"blocks.{i}.{name}": module for name, module in quantized.items()}
        report += [{"layer": i, **entry} for entry in entries]
    replaced = {f"{name}.weight" for name in weights}
    kept = {n: p.detach() for n, p in model.named_parameters() if n not in replaced and not n.endswith(("gate_up_ED2F", "down_EFD"))}
    quantized = with_quantized(c, weights, kept)
    quantized.report = report
    return quantized


@torch.no_grad()
def oversample(model, pool, first=FIRST, minimum=MINIMUM):
    """Indices of the batches (B, T) of `pool` to calibrate on (v3): the first ones; then, one at a time, the batch with the most tokens
    for experts that have seen fewer than `minimum`, until all have enough or no batch helps."""
    device, E = model.embedding.weight.device, model.config.n_experts
    counts_PLE = torch.stack([torch.stack([count_assignments(i, E) for _, i in model.hidden(batch.to(device))[1]]).cpu() for batch in pool])
    chosen = list(range(min(first, len(pool))))
    while True:
        missing_LE = (minimum - counts_PLE[chosen].sum(0)).clamp(min=0)
        gain_P = torch.minimum(counts_PLE, missing_LE).sum((1, 2))
        gain_P[chosen] = 0
        if not gain_P.max():
            return chosen
        chosen.append(gain_P.argmax().item())


def calibration_pool(tokenizer, data, context, seed, n=POOL):
    """n batches (1, T): documents and training conversations (thoughts included) in turn; with a folder `data`, n of its documents
    (all of them are read)."""
    texts, rng = (document["text"] for document in reader.documents(data, "general", seed)), random.Random(seed)
    if data:  # its files come one after the other: n documents out of all, each as likely
        ids = map(tokenizer.encode, heapq.nsmallest(n, texts, key=lambda _: rng.random()))
    else:  # the marketplace takes its languages in turn
        tasks = training(seed, -(-n // 16))
        rng.shuffle(tasks)
        chats = (tokenizer.encode_chat(chat_of(task, "think" in task), "think" in task)[0] for task in tasks)
        ids = (sample for pair in zip(map(tokenizer.encode, itertools.islice(texts, n // 2)), chats, strict=False) for sample in pair)
    return [torch.tensor([sample[:context]]) for sample in ids if len(sample) > 1]


def report_table(report):
    """A line for each layer's attention, experts and shared experts: tokens seen, then alpha and error before -> after of both matrices."""
    lines = [f"{'layer':>5} {'part':10} {'tokens':>7}   first matrix: alpha, error before -> after   second (out or down)"]
    for first, second in zip(report[0::2], report[1::2], strict=True):
        part = first["expert"] or "attention"
        part = f"expert {part}" if part.isdecimal() else part
        cells = [f"{m['matrix']:8} {m['alpha']:.2f}  {100 * m['before']:6.2f} -> {100 * m['after']:6.2f} %" for m in (first, second)]
        few = " (few: lent tokens of other experts)" if part.startswith("expert") and first["tokens"] < MINIMUM else ""
        lines.append(f"{first['layer']:5} {part:10} {first['tokens']:7}   {cells[0]:44} {cells[1]}{few}")
    return "\n".join(lines)


def main():
    args = cli.parse(
        __doc__, "run", "stage", "data", "device", "seed",
        stage=dict(default=None, help="stage to quantize (default: the run's last)"),
        data=dict(help="folder of .txt/.jsonl to calibrate on (default: training conversations and documents of the embedded marketplace)"),
        method=dict(default="awq", choices=METHODS, help="awq and rtn: int4; fp8 and fp8-naive: W8A8"),
        group=dict(type=int, default=GROUP, help="inputs that share an int4 scale, a power of two (narrower layers: what divides them)"),
        out=dict(help="run folder to write (default: <run>-<method>)"),
    )  # fmt: skip
    device, tokenizer, out = cli.pick_device(args.device), Tokenizer.load(args.run), args.out or f"{args.run.rstrip('/')}-{args.method}"
    state = checkpoint.load_latest(args.run, args.stage or checkpoint.latest_stage(args.run))
    checkpoint.inherit(state, tokenizer)
    path = os.path.join(out, state["stage"].partition("/")[0], f"step_{state['step']}.pt")
    checkpoint.refuse_occupied(out)
    model = checkpoint.load_model(state, device).eval()
    pool = calibration_pool(tokenizer, args.data, model.config.max_seq_len, args.seed)
    if not pool:
        raise InputError(f"--data {args.data}: no text of two tokens or more to calibrate on")
    chosen = oversample(model, pool)
    quantized = quantize_model(model, [pool[i] for i in chosen], args.method, args.group, args.seed)
    least, total = min(entry["tokens"] for entry in quantized.report), sum(pool[i].numel() for i in chosen)
    print(f"calibrated on {len(chosen)} of {len(pool)} texts, {total:,} tokens; the rarest expert saw {least}, wanted are {MINIMUM}")
    print(report_table(quantized.report))
    for name, p in quantized.named_parameters():  # what is left alone stays in the precision it was stored in
        p.data = p.data.to(state["model"][name].dtype)
    tokenizer.save(out)
    cli.write_jsonl(os.path.join(out, "metrics.jsonl"), checkpoint.read_metrics(args.run))
    group = None if args.method.startswith("fp8") else args.group
    summary = {"method": args.method, "group": group, "texts": len(chosen), "minimum": MINIMUM, "matrices": quantized.report}
    cli.write_atomically(os.path.join(out, "quantization.json"), json.dumps(summary, indent=1).encode())
    checkpoint.save_checkpoint(path, quantized.cpu(), **{key: state[key] for key in ("step", "stage", "base", "tokenizer_hash", "seed")})
    full = sum(t.numel() * t.element_size() for t in state["model"].values())
    print(f"{path}: {os.path.getsize(path) / 1e6:.2f} MB, the weights it came from {full / 1e6:.2f} MB")


if __name__ == "__main__":
    cli.run(main)
