"""Quantization after training: round-to-nearest and AWQ in 4 bits, FP8 in 8, calibrated expert by expert (v2 §6.3; v3's expert-aware FP8).

A weight matrix W is stored as small integers (int4, one scale and zero for each group of inputs) or as e4m3 numbers (fp8, one scale for
each output). What hurts is not the weight's error but the output's, and a few inputs are much larger than the rest. So inputs are
multiplied by c and W's columns divided by c, which changes nothing in exact arithmetic, and c is chosen by the output error on
calibration tokens: AWQ tries c = (mean |x|)^-alpha and then clips ranges; FP8 tries SmoothQuant's c = max|W|^(1-alpha) / max|x|^alpha. No
scaling is always among the candidates. Each expert is calibrated on the tokens routed to it. A router that sends some expert
few tokens would leave that expert badly calibrated: `oversample` picks further batches until every expert has seen MINIMUM tokens.

The c of qkv, out and gate_up stay explicit and multiply the (sorted) inputs: the norm before the experts feeds the router too, so
that c cannot go there without touching it. Only the c of down folds, into the rows of up. Router, head, embedding, norms and MTP
blocks are left as they are, bit for bit.

Shapes: E matrices in one tensor (a layer's experts; 1 for a plain linear layer), F outputs, D inputs, J = D / group, R rows sorted by
expert, N calibration rows of one matrix, L layers, P batches to choose from.

    python quantize.py                              # runs/demo -> runs/demo-awq, which generate.py and evaluate.py load by --run
    python quantize.py --run runs/demo --method fp8 --device cuda
"""

import itertools
import json
import math
import os
import random
import shutil
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import checkpoint
import cli
from cli import InputError
from compass import Compass, CompassConfig, rope_table
from data import reader
from data.tasks import training
from kernels import dequantise_rows, fp8_grouped_matmul, int4_grouped_matmul, quantise_rows, unpack_int4
from moe import MoE
from tokenizer import Tokenizer

METHODS = ("awq", "rtn", "fp8", "fp8-naive")
GROUP = 128  # inputs that share a scale and a zero; AWQ's usual choice (the report gives none). Narrower layers: what divides them
ALPHAS = [i / 20 for i in range(20)]
CLIPS = [1 - i / 20 for i in range(11)]  # shares of a group's range, down to a half
MINIMUM, ROWS = 64, 512  # tokens that every expert must have seen; rows at most that a search looks at
UNPACK = 64  # rows of one matrix from which dequantising it is cheaper than torch's int4 product on a CPU
FIRST, POOL = 64, 512  # batches that calibrate in any case, and among how many `oversample` may choose


def round_up_to_bf16(positive):
    """The next larger number that bf16 holds, in fp32: scales are stored in bf16, and one rounded down would cut the range."""
    return ((positive.contiguous().view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)


def quantize_int4(weight, group_size, clip=1.0):
    """Asymmetric int4 with one scale and zero a group: w = (q - zero) * scale within scale / 2, where nothing is clipped.

    weight (..., out, in) -> qweight uint8 (..., out, in / 2), low nibble first; scales (numbers that bf16 holds) and zeros (whole, 0..15),
    both fp32 (..., out, in / group). clip multiplies each group's range, a number or (..., out, in / group). Raises InputError
    where the group does not divide the inputs or a weight is not finite.
    """
    if weight.shape[-1] % 2 or group_size < 1 or weight.shape[-1] % group_size:
        raise InputError(f"int4: groups of {group_size} do not divide {weight.shape[-1]} inputs, or these are odd")
    if not weight.isfinite().all():
        raise InputError("int4: the weight is not finite: the checkpoint is damaged or training diverged")
    grouped = weight.float().unflatten(-1, (-1, group_size))
    low, high = grouped.amin(-1).clamp(max=0) * clip, grouped.amax(-1).clamp(min=0) * clip  # zero is always in range
    scales = round_up_to_bf16(torch.where(high > low, ((high - low) / 15).clamp(min=1e-30), 1.0))
    zeros = (-low / scales).round()
    q = (grouped / scales.unsqueeze(-1) + zeros.unsqueeze(-1)).round().clamp(0, 15).to(torch.uint8).flatten(-2)
    return q[..., 0::2] | q[..., 1::2] << 4, scales, zeros


def dequantize_int4(qweight, scales, zeros):
    """(q - zero) * scale, (..., out, in), in the scales' dtype."""
    return dequantise_rows(qweight, scales, zeros)


def quantize_fp8(weight):
    """weight (..., out, in) -> (e4m3 (..., out, in), fp32 scale (..., out)), each output's largest weight at e4m3's 448.

    Raises InputError where a weight is not finite.
    """
    if not weight.isfinite().all():
        raise InputError("fp8: the weight is not finite: the checkpoint is damaged or training diverged")
    return quantise_rows(weight)


def dequantize_fp8(weight_fp8, scale):
    """weight_fp8 * scale, (..., out, in), fp32."""
    return weight_fp8.float() * scale.unsqueeze(-1)


def scaled_rows(x_RD, input_scale, counts_E):
    """Each expert's rows times its input scale (E, D) in x's dtype; None scales nothing."""
    if input_scale is None:
        return x_RD
    if len(input_scale) > 1:
        input_scale = input_scale.repeat_interleave(counts_E, 0, output_size=len(x_RD))
    return x_RD * input_scale.to(x_RD.dtype)


def grouped(x, counts_E):
    """(rows (R, D), counts_E): x itself flattened, and all rows for the one matrix where no counts are given."""
    rows = x.reshape(-1, x.shape[-1])
    return rows, torch.tensor([len(rows)], device=x.device) if counts_E is None else counts_E


def bf16_product(x_RD, weight_FD):
    """x times weight transposed, both bf16; for one row torch.mv, which reads the weight twice as fast on a CPU."""
    return (weight_FD @ x_RD[0])[None] if len(x_RD) == 1 else x_RD @ weight_FD.T


class Int4Linear(nn.Module):
    """E int4 matrices, W4A16: qweight (E, F, D/2) uint8, scales (E, F, J) bf16, zeros (E, F, J) uint8, input_scale (E, D) bf16 or None.

    forward: x (R, D) sorted by expert with counts_E -> (R, F); without counts, where E is 1, any (..., D). On a GPU it is
    kernels.int4_grouped_matmul; on a CPU its eager twin, or after `pack` torch's int4 product in bf16, which reads half a byte a weight.
    """

    def __init__(self, qweight, scales, zeros, input_scale=None):
        super().__init__()
        for name, tensor in (("qweight", qweight), ("scales", scales), ("zeros", zeros), ("input_scale", input_scale)):
            self.register_buffer(name, tensor)
        self.packed = None

    def pack(self):
        """Make torch's CPU layout beside ours (w = (q - 8) * scale + offset), where it takes such groups and widths."""
        D, self.group = 2 * self.qweight.shape[2], 2 * self.qweight.shape[2] // self.scales.shape[2]
        if self.group in (32, 64, 128, 256) and self.qweight.shape[1] % 16 == 0 and D % 32 == 0:
            offsets = (8 - self.zeros.float()) * self.scales.float()
            self.packed = [
                (
                    torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpack_int4(q).int(), 2),
                    torch.stack((s.float().T, o.T), -1).bfloat16().contiguous(),
                )
                for q, s, o in zip(self.qweight, self.scales, offsets, strict=True)
            ]

    def _multiply_packed(self, x_ND, e):
        if len(x_ND) > UNPACK:
            return bf16_product(x_ND, dequantise_rows(self.qweight[e], self.scales[e], self.zeros[e]))
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x_ND, self.packed[e][0], self.group, self.packed[e][1])

    def forward(self, x, counts_E=None):
        rows, counts_E = grouped(x, counts_E)
        rows = scaled_rows(rows, self.input_scale, counts_E)
        if self.packed is None:
            y = int4_grouped_matmul(rows, self.qweight, self.scales, self.zeros, counts_E)
        else:
            parts = enumerate(rows.bfloat16().split(counts_E.tolist()))
            y = torch.cat([self._multiply_packed(x_ND, e) for e, x_ND in parts if len(x_ND)]).to(x.dtype)
        return y.unflatten(0, x.shape[:-1])


class FP8Linear(nn.Module):
    """E e4m3 matrices, W8A8. Tensors: weight_fp8 (E, F, D), weight_scale (E, F) fp32, input_scale (E, D) bf16 or None.

    forward as Int4Linear's: kernels.fp8_grouped_matmul on a GPU, its eager twin on a CPU. `pack` widens the weights to bf16, which holds
    every e4m3 number, so the products stay those of fp8 and only the sums are rounded to bf16: CPUs have no fp8 instruction.
    """

    def __init__(self, weight_fp8, weight_scale, input_scale=None):
        super().__init__()
        for name, tensor in (("weight_fp8", weight_fp8), ("weight_scale", weight_scale), ("input_scale", input_scale)):
            self.register_buffer(name, tensor)

    def pack(self):
        self.weight_fp8 = self.weight_fp8.bfloat16()

    def forward(self, x, counts_E=None):
        rows, counts_E = grouped(x, counts_E)
        rows = scaled_rows(rows, self.input_scale, counts_E)
        if self.weight_fp8.dtype == torch.float8_e4m3fn:
            y = fp8_grouped_matmul(rows, self.weight_fp8, self.weight_scale, counts_E)
        else:
            x_fp8_RD, scale_R = quantise_rows(rows)
            parts = enumerate(x_fp8_RD.bfloat16().split(counts_E.tolist()))
            y = torch.cat([bf16_product(x_ND, self.weight_fp8[e]) * self.weight_scale[e] for e, x_ND in parts if len(x_ND)])
            y = (y * scale_R.unsqueeze(-1)).to(x.dtype)
        return y.unflatten(0, x.shape[:-1])


class QuantizedMoE(MoE):
    """The MoE layer with its router and shared experts, and quantized matrices in place of the routed experts' two tensors."""

    def __init__(self, moe, gate_up, down):
        nn.Module.__init__(self)
        self.top_k, self.n_experts, self.router, self.shared = moe.top_k, moe.n_experts, moe.router, moe.shared
        self.gate_up, self.down = gate_up, down

    def experts(self, x_RD, counts_E):
        gate_RF, up_RF = self.gate_up(x_RD, counts_E).chunk(2, dim=-1)
        return self.down(F.silu(gate_RF) * up_RF, counts_E)


def matrices(config):
    """{module name: (E, F, D)} of everything that is quantized."""
    c, sizes = config, {}
    for i in range(c.n_layers):
        attention, moe = f"blocks.{i}.attention", f"blocks.{i}.feed_forward"
        sizes[f"{attention}.qkv"] = (1, (c.n_heads + 2 * c.n_kv_heads) * c.head_dim, c.dim)
        sizes[f"{attention}.out"] = (1, c.dim, c.n_heads * c.head_dim)
        for name, E, width in ((moe, c.n_experts, c.expert_dim), (f"{moe}.shared", 1, c.n_shared * c.expert_dim)):
            if width:
                sizes[f"{name}.gate_up"], sizes[f"{name}.down"] = (E, 2 * width, c.dim), (E, c.dim, width)
    return sizes


def with_quantized(config, weights, tensors):
    """A Compass in eval mode: `weights` maps the names of `matrices` to Int4Linear or FP8Linear, `tensors` the other names to tensors."""
    with torch.device("meta"):
        model = Compass(config)
    for block in model.blocks:
        block.feed_forward = QuantizedMoE(block.feed_forward, None, None)
    for name, module in weights.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, module)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    if wrong := shapes.keys() ^ tensors.keys():
        raise InputError(f"quantized checkpoint: tensor {min(wrong)} is missing or foreign")
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name]:
            raise InputError(f"quantized checkpoint: tensor {name} has shape {tuple(tensor.shape)}, need {tuple(shapes[name])}")
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
    return model.eval()


def is_quantized(state):
    """Whether a checkpoint dict holds quantized weights."""
    return any(name.endswith((".qweight", ".weight_fp8")) for name in state["model"])


def load_quantized(state, device="cpu"):
    """The model of a checkpoint dict that quantize.py wrote, in eval mode, on a CPU packed. Raises InputError naming what does not fit."""
    config, tensors, weights = CompassConfig(**state["config"]), dict(state["model"]), {}
    for name, (E, out, inner) in matrices(config).items():
        found = {key[len(name) + 1 :]: tensors.pop(key) for key in list(tensors) if key.rpartition(".")[0] == name}
        groups = found["scales"].shape[-1] if "scales" in found else 1
        shapes = {
            "qweight": (E, out, inner // 2), "scales": (E, out, groups), "zeros": (E, out, groups),
            "weight_fp8": (E, out, inner), "weight_scale": (E, out), "input_scale": (E, inner),
        }  # fmt: skip
        kind, parts = (Int4Linear, {"qweight", "scales", "zeros"}) if "qweight" in found else (FP8Linear, {"weight_fp8", "weight_scale"})
        if set(found) - {"input_scale"} != parts or inner % groups:
            raise InputError(f"quantized checkpoint: {name} holds {', '.join(sorted(found)) or 'nothing'}")
        for key, tensor in found.items():
            if tensor.shape != shapes[key]:
                raise InputError(f"quantized checkpoint: tensor {name}.{key} has shape {tuple(tensor.shape)}, need {shapes[key]}")
        weights[name] = kind(**found)
    model = with_quantized(config, weights, {name: tensor.float() for name, tensor in tensors.items()}).to(device)
    if torch.device(device).type == "cpu":
        pack(model)
    return model


def pack(model):
    """Bring every quantized matrix into the form that is fastest on a CPU."""
    for module in model.modules():
        if isinstance(module, (Int4Linear, FP8Linear)):
            module.pack()


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


def quantize_matrix(weight_FD, x_ND, method, group):
    """Search c, then (AWQ) clips, by the output error on x; return Found. Never worse on x than rounding alone."""
    weight_FD, x_ND, tried = weight_FD.float(), x_ND.float(), []
    group = math.gcd(group, weight_FD.shape[1])
    for alpha, c_D in input_scales(weight_FD, x_ND, method):
        error = row_errors(weight_FD / c_D, round_weight(weight_FD / c_D, method, group)[1], x_ND * c_D, method).sum().item()
        tried.append((error, alpha, c_D))
    _, alpha, c_D = min(tried, key=lambda candidate: candidate[0])
    scaled_FD, scaled_ND = weight_FD / c_D, x_ND * c_D
    clip = best_clips(scaled_FD, scaled_ND, group) if method == "awq" else 1.0
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
    modules = {"qkv": block.attention.qkv, "out": block.attention.out, "feed_forward": block.feed_forward}
    seen = {name: [] for name in modules}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, kept=seen[name]: kept.append(args[0].flatten(0, -2)))
        for name, module in modules.items()
    ]  # fmt: skip
    results = [block(x_BTD, rope, None) for x_BTD, rope in zip(hidden, ropes, strict=True)]
    for hook in hooks:
        hook.remove()
    return [x for x, _ in results], {name: torch.cat(rows) for name, rows in seen.items()}, torch.cat([index for _, (_, index) in results])


def quantize_layer(block, inputs, index_NK, method, group, generator):
    """({module name: module}, report entries) of one block. An expert that saw fewer than MINIMUM tokens is calibrated on those of all."""
    weights, report, moe = {}, [], block.feed_forward

    def some(rows):
        """ROWS of the rows, at random."""
        return rows[torch.randperm(len(rows), generator=generator)[:ROWS].to(rows.device)]

    def note(name, found, tokens, used):
        part, _, expert = name.partition(" ")
        errors = {"alpha": found.alpha, "before": found.before, "after": found.after}
        report.append({"matrix": part, "expert": expert or None, "tokens": tokens, "calibrated_on": used, **errors})

    for name, linear in (("qkv", block.attention.qkv), ("out", block.attention.out)):
        x_ND = some(inputs[name])
        found = quantize_matrix(linear.weight, x_ND, method, group)
        weights[f"attention.{name}"] = stack([found])
        note(name, found, len(inputs[name]), len(x_ND))
    x_ND, pairs = inputs["feed_forward"], []
    for e, (gate_up_D2F, down_FD) in enumerate(zip(moe.gate_up_ED2F, moe.down_EFD, strict=True)):
        own = x_ND[(index_NK == e).any(1)]
        chosen = some(own if len(own) >= MINIMUM else x_ND)
        pairs.append(quantize_swiglu(gate_up_D2F.float().T, down_FD.float().T, chosen.float(), method, group))
        for name, found in zip(("gate_up", "down"), pairs[-1], strict=True):
            note(f"{name} {e}", found, len(own), len(chosen))
    weights["feed_forward.gate_up"], weights["feed_forward.down"] = stack([p[0] for p in pairs]), stack([p[1] for p in pairs], folded=True)
    if moe.shared is not None:
        chosen = some(x_ND)
        pair = quantize_swiglu(moe.shared.gate_up.weight.float(), moe.shared.down.weight.float(), chosen.float(), method, group)
        weights["feed_forward.shared.gate_up"], weights["feed_forward.shared.down"] = stack(pair[:1]), stack(pair[1:], folded=True)
        for name, found in zip(("gate_up", "down"), pair, strict=True):
            note(f"{name} shared", found, len(x_ND), len(chosen))
    return weights, report


@torch.no_grad()
def quantize_model(model, calibration, method="awq", group=GROUP, seed=0):
    """A quantized copy of a Compass, in eval mode, that shares the tensors it leaves alone; its `report` lists every matrix.

    calibration: token batches (B, T), int64, without padding; the model runs on them in full precision, layer by layer. method: "awq",
    "rtn" (int4, no search), "fp8" (W8A8, smoothed) or "fp8-naive" (no smoothing). A report entry: layer, matrix, expert (None: attention),
    tokens seen, rows calibrated on, alpha, relative output errors before (rounding alone) and after the search. Raises InputError
    on an unknown method, no batches, or a token outside the vocabulary.
    """
    if method not in METHODS:
        raise InputError(f"method {method!r} is not one of {', '.join(METHODS)}")
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
    """Indices of the batches (B, T) of `pool` to calibrate on (v3): the first ones, then, one by one, what brings experts most of the
    tokens that they lack to `minimum`, for as long as the pool brings any."""
    device, E = model.embedding.weight.device, model.config.n_experts
    counts_PLE = torch.stack(
        [torch.stack([torch.bincount(i.flatten(), minlength=E) for _, i in model.hidden(batch.to(device))[1]]).cpu() for batch in pool]
    )
    chosen = list(range(min(first, len(pool))))
    while True:
        missing_LE = (minimum - counts_PLE[chosen].sum(0)).clamp(min=0)
        gain_P = torch.minimum(counts_PLE, missing_LE).sum((1, 2))
        gain_P[chosen] = 0
        if not gain_P.max():
            return chosen
        chosen.append(gain_P.argmax().item())


def calibration_pool(tokenizer, data, context, seed, n=POOL):
    """n batches (1, T): training conversations and documents in turn, all languages; with a folder `data`, its documents alone."""
    documents = [d["text"] for d in itertools.islice(reader.documents(data, "general", seed), n)]
    ids = [tokenizer.encode(text) for text in documents]
    if data is None:
        tasks = training(seed, -(-n // 16))
        random.Random(seed).shuffle(tasks)
        chats = [tokenizer.encode_chat([*t["messages"], {"role": "assistant", "content": t["answer"]}])[0] for t in tasks[: n // 2]]
        ids = [sample for pair in zip(ids[: n // 2], chats, strict=False) for sample in pair]
    return [torch.tensor([sample[:context]]) for sample in ids if len(sample) > 1]


def report_table(report):
    """A line for each layer's attention, experts and shared experts: tokens seen, then alpha and error before -> after of both matrices."""
    lines = [f"{'layer':>5} {'part':10} {'tokens':>7}   first matrix: alpha, error before -> after   second (out or down)"]
    for first, second in zip(report[0::2], report[1::2], strict=True):
        part = first["expert"] or "attention"
        part = f"expert {part}" if part.isdecimal() else part
        cells = [f"{m['matrix']:8} {m['alpha']:.2f}  {100 * m['before']:6.2f} -> {100 * m['after']:6.2f} %" for m in (first, second)]
        few = " (too few: calibrated on all tokens)" if first["tokens"] < MINIMUM else ""
        lines.append(f"{first['layer']:5} {part:10} {first['tokens']:7}   {cells[0]:44} {cells[1]}{few}")
    return "\n".join(lines)


def main():
    args = cli.parse(
        __doc__, "run", "stage", "data", "device", "seed",
        stage=dict(default=None, help="stage to quantize (default: the run's last)"),
        data=dict(help="folder of .txt/.jsonl to calibrate on (default: training conversations and documents of the embedded marketplace)"),
        method=dict(default="awq", choices=METHODS, help="awq and rtn: int4; fp8 and fp8-naive: W8A8"),
        group=dict(type=int, default=GROUP, help="inputs that share an int4 scale (narrower layers: what divides them)"),
        out=dict(help="run folder to write (default: <run>-<method>)"),
    )  # fmt: skip
    device, tokenizer, out = cli.pick_device(args.device), Tokenizer.load(args.run), args.out or f"{args.run.rstrip('/')}-{args.method}"
    stage = args.stage or checkpoint.latest_stage(args.run)
    state = checkpoint.load_latest(args.run, stage)
    checkpoint.inherit(state, tokenizer)
    path = os.path.join(out, stage, f"step_{state['step']}.pt")
    if checkpoint.checkpoints(out, stage):
        raise InputError(f"{out}/{stage} already holds a checkpoint: name another folder with --out, or delete it")
    model = checkpoint.load_model(state, device).eval()
    pool = calibration_pool(tokenizer, args.data, model.config.max_seq_len, args.seed)
    chosen = oversample(model, pool)
    print(f"calibration: {len(chosen)} of {len(pool)} texts, {sum(pool[i].numel() for i in chosen):,} tokens, at least {MINIMUM} an expert")
    quantized = quantize_model(model, [pool[i] for i in chosen], args.method, args.group, args.seed)
    print(report_table(quantized.report))
    for name, p in quantized.named_parameters():  # what is left alone stays in the precision it was stored in
        p.data = p.data.to(state["model"][name].dtype)
    os.makedirs(out, exist_ok=True)
    for name in sorted(os.listdir(args.run)):
        if name.startswith("tokenizer.") or name == "metrics.jsonl":
            shutil.copy(os.path.join(args.run, name), out)
    summary = {"method": args.method, "group": args.group, "texts": len(chosen), "minimum": MINIMUM, "matrices": quantized.report}
    checkpoint.write_atomically(os.path.join(out, "quantization.json"), json.dumps(summary, indent=1).encode())
    checkpoint.save_checkpoint(
        path, quantized.cpu(), step=state["step"], stage=stage, tokenizer_hash=state["tokenizer_hash"], seed=state["seed"]
    )  # fmt: skip
    full = sum(t.numel() * t.element_size() for t in state["model"].values())
    print(f"{path}: {os.path.getsize(path) / 1e6:.2f} MB, the weights it came from {full / 1e6:.2f} MB")


if __name__ == "__main__":
    cli.run(main)
