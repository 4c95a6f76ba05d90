"""What the kernels and the whole model reach on one GPU, each figure beside a limit or a peer from the same run.

    kernels     permute and unpermute at the sizes of v2_30b, forward and backward, beside a plain copy of as many bytes
    products    int4 and FP8 products with one matrix (few rows: decoding; many: prefill) and grouped by expert, beside torch's in bf16
    layer       forward and backward of one MoE layer of v2_30b beside its products alone, dense
    training    steps of `small` (AdamW, bf16) at its recipe's context: tokens/s, share of the rate of a large product, memory
    decoding    `small` with random weights in bf16, int4 and FP8, 1, 8 and 64 rows at once

Inputs are random; times are medians by CUDA events with the cache flushed before each (triton.testing.do_bench).

    python -m benchmarks.gpu      # about a minute on an H100
"""

import json
import time
from dataclasses import replace

import torch
from torch import nn
from torch.nn.functional import grouped_mm

import cli
from benchmarks import keep
from benchmarks.generation import endless_tokenizer
from benchmarks.moe import step_flops
from benchmarks.quantization import held
from cli import InputError
from compass import CONFIGS, Compass
from engine import Engine
from generate import GREEDY
from kernels import fp8_grouped_matmul, int4_grouped_matmul, permute, permute_reference, unpermute, unpermute_reference
from lowbit import FP8Linear, Int4Linear, matrices, with_quantized
from moe import MoE
from quantize import GROUP, round_weight
from recipes import RECIPES
from report import table
from train import CLIP, assemble, language_model_loss, make_optimizer, precision

DEVICE = "cuda"
TOKENS = 8192


def milliseconds(run):
    from triton.testing import do_bench

    return do_bench(run, warmup=50, rep=200, return_mode="median")


def rates():
    """{"copy": bytes a second read and written, "bf16": FLOPs a second}: what this GPU reaches on a plain copy and a large product."""
    a, b = torch.randn(2**29, device=DEVICE, dtype=torch.bfloat16), torch.empty(2**29, device=DEVICE, dtype=torch.bfloat16)
    copy = 2 * a.nbytes / milliseconds(lambda: b.copy_(a))
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in "ab")
    return {"copy": 1e3 * copy, "bf16": 1e3 * 2 * 8192**3 / milliseconds(lambda: a @ b)}


def kernels(limits):
    """{movement: {ms, share of the copy's rate, times the eager twin's}}; bytes are the least: every row read once and written once."""
    c, results = CONFIGS["v2_30b"], {}
    index_NK = torch.rand(TOKENS, c.n_experts, device=DEVICE).topk(c.top_k).indices
    weights_NK = torch.rand(TOKENS, c.top_k, device=DEVICE, requires_grad=True)
    x_ND = torch.randn(TOKENS, c.dim, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    row = 2 * c.dim * TOKENS  # bytes of x
    arms = {}
    for name, (there, back) in {"ours": (permute, unpermute), "twin": (permute_reference, unpermute_reference)}.items():
        x_RD, row_of_NK, _ = there(x_ND, index_NK, c.n_experts)
        y_RD = x_RD.detach().requires_grad_()
        y_ND = back(y_RD, row_of_NK, weights_NK)
        grad_RD, grad_ND = torch.randn_like(x_RD), torch.randn_like(y_ND)
        arms[name] = {
            "permute, with its sort": (1 + c.top_k, lambda there=there: there(x_ND, index_NK, c.n_experts)),
            "permute, backward": (1 + c.top_k, lambda x=x_RD, g=grad_RD: torch.autograd.grad(x, x_ND, g, retain_graph=True)),
            "unpermute": (1 + c.top_k, lambda back=back, y=y_RD, r=row_of_NK: back(y, r, weights_NK)),
            "unpermute, backward": (
                1 + 2 * c.top_k,
                lambda y=y_ND, x=y_RD, g=grad_ND: torch.autograd.grad(y, (x, weights_NK), g, retain_graph=True),
            ),
        }
    for movement, (rows, run) in arms["ours"].items():
        ms, twin = milliseconds(run), milliseconds(arms["twin"][movement][1])
        results[movement] = {"ms": ms, "of the copy": rows * row / (1e-3 * ms) / limits["copy"], "twin / ours": twin / ms}
        print(movement, json.dumps(results[movement]), flush=True)
    return results


def products(limits):
    """{case: {ms of bf16, int4, fp8 and the shares of the limit}} of v2_30b's expert matrix, plain and grouped.

    The limit is the larger of the time that its bytes take in a copy's rate and its operations in a large product's.
    """
    c, results = CONFIGS["v2_30b"], {}
    for E, rows in ((1, 1), (1, 16), (1, 256), (1, 8192), (c.n_experts, c.top_k * 64), (c.n_experts, c.top_k * TOKENS)):
        case = f"{rows:,} row{'s' * (rows > 1)}, " + ("one matrix" if E == 1 else f"{E} experts")
        results[case] = product(E, rows, c.dim, 2 * c.expert_dim, limits)
        print(case, json.dumps(results[case]), flush=True)
    return results


def product(E, rows, D, F, limits):
    """{arm: {ms, share, error}} of `rows` rows, about the same number for each of E matrices (F, D). error: from bf16's product."""
    weight_EFD = torch.randn(E, F, D, device=DEVICE, dtype=torch.bfloat16) / D**0.5
    int4, fp8 = (tuple(round_weight(weight_EFD, method, GROUP)[0].values()) for method in ("rtn", "fp8"))
    x_RD = torch.randn(rows, D, device=DEVICE, dtype=torch.bfloat16)
    counts_E = torch.full((E,), rows // E, device=DEVICE)
    counts_E[0] += rows - counts_E.sum()
    ends_E, weight_EDF = counts_E.cumsum(0).to(torch.int32), weight_EFD.transpose(1, 2)
    plain = (lambda: x_RD @ weight_EDF[0]) if E == 1 else (lambda: grouped_mm(x_RD, weight_EDF, offs=ends_E))
    arms = {
        "bf16": (weight_EFD.nbytes, plain),
        "int4": (sum(t.nbytes for t in int4), lambda: int4_grouped_matmul(x_RD, *int4, counts_E)),
        "fp8": (sum(t.nbytes for t in fp8), lambda: fp8_grouped_matmul(x_RD, *fp8, counts_E)),
    }
    exact, result = plain().float(), {}
    for name, (read, run) in arms.items():
        error, ms = (run().float() - exact).norm() / exact.norm(), milliseconds(run)
        assert error < 0.15, (name, error)
        rate = limits["bf16"] * (2 if name == "fp8" else 1)  # an fp8 product has twice the rate of bf16 by its data sheet
        least = max((read + 2 * rows * (D + F)) / limits["copy"], 2 * rows * D * F / rate)
        result[name] = {"ms": ms, "share": 1e3 * least / ms, "error": error.item()}
    return result


def layer(limits):
    """One MoE layer of v2_30b in bf16, forward and backward, and the same operations as two dense products."""
    c = CONFIGS["v2_30b"]
    torch.manual_seed(0)
    with torch.device(DEVICE):
        moe, width = MoE(c), (c.top_k + c.n_shared) * c.expert_dim
        dense = nn.ModuleList((nn.Linear(c.dim, 2 * width, bias=False), nn.Linear(width, c.dim, bias=False)))
        x_BTD = torch.randn(1, TOKENS, c.dim, dtype=torch.bfloat16)
    for p in moe.parameters():
        nn.init.normal_(p, std=c.dim**-0.5)
    moe, dense = moe.bfloat16(), dense.bfloat16()

    def run(module, forward):
        module.zero_grad(set_to_none=True)
        forward(x_BTD.detach().requires_grad_()).float().square().mean().backward()

    flops = 6 * TOKENS * 3 * c.dim * width
    arms = {
        "layer": lambda: run(moe, lambda x: moe(x)[0]),
        "its products, dense": lambda: run(dense, lambda x: dense[1](dense[0](x)[..., :width])),
    }
    results = {}
    for name, arm in arms.items():
        ms = milliseconds(arm)
        results[name] = {"ms": ms, "of the product's rate": flops / (1e-3 * ms) / limits["bf16"]}
    print(json.dumps(results), flush=True)
    return results


def training(limits, steps=8):
    """Optimizer steps of `small`, one micro-batch each; every row is a document of random tokens."""
    config, recipe = CONFIGS["small"], RECIPES["small"]["general"]
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = Compass(config)
    optimizer, device = make_optimizer(model), torch.device(DEVICE)
    rows, T, seconds = recipe.micro_rows, recipe.seq_len, []
    documents = [[(torch.randint(config.vocab_size, (T,)).numpy(), [1] * T)] for _ in range(rows)]
    batch = {name: tensor.to(DEVICE) for name, tensor in assemble(documents, T).items()}
    torch.cuda.reset_peak_memory_stats()
    for _ in range(steps):
        torch.cuda.synchronize()
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with precision(model, device):
            loss, _ = language_model_loss(model, batch)
        loss.backward()
        torch.cuda.synchronize()
        forward_and_backward = time.perf_counter() - began
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        torch.cuda.synchronize()
        seconds.append((forward_and_backward, time.perf_counter() - began))
    micro, step = (sorted(column)[steps // 2] for column in zip(*seconds, strict=True))
    tokens = rows * T
    results = {
        "tokens": tokens, "micro-batch, ms": 1e3 * micro, "optimizer, ms": 1e3 * (step - micro), "tokens/s": tokens / micro,
        "of the product's rate": step_flops(config, tokens, T) / micro / limits["bf16"],
        "peak memory, GB": torch.cuda.max_memory_allocated() / 1e9,
    }  # fmt: skip
    print(json.dumps(results), flush=True)
    return results


def small_models():
    """(name, `small` with random weights) in bf16, int4, FP8; one after the other."""
    config = replace(CONFIGS["small"], max_seq_len=1024)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = Compass(config).eval()
    for name, p in model.named_parameters():
        if not name.endswith("router.weight"):
            p.data = p.data.bfloat16()
    yield "bf16", model
    state, names = model.state_dict(), matrices(config)
    for kind, method, module in (("int4", "rtn", Int4Linear), ("fp8", "fp8", FP8Linear)):
        weights, used = {}, set()
        for name, (E, _, _) in names.items():
            key = f"{name}.weight" if E == 1 else {"gate_up": f"{name}_ED2F", "down": f"{name}_EFD"}[name.rpartition(".")[2]]
            weight = state[key][None] if E == 1 else state[key].transpose(1, 2)
            weights[name] = module(**round_weight(weight, method, GROUP)[0])
            used.add(key)
        yield kind, with_quantized(config, weights, {name: t for name, t in state.items() if name not in used}).to(DEVICE)


def decoding(new=64):
    """{rows at once: {kind: figures}} and {"memory, GB": {kind: weights}}; greedy, prompts of 128 tokens, prefill not counted."""
    config, tokenizer, results = CONFIGS["small"], endless_tokenizer(CONFIGS["small"].vocab_size), {}
    for kind, model in small_models():
        for rows in (1, 8, 64):
            engine = Engine(model, tokenizer, rows, 256)
            for prompt in torch.randint(config.vocab_size, (rows, 128)).tolist():
                engine.submit(prompt, replace(GREEDY, max_tokens=new))
            for _ in range(8):
                engine.step()
            torch.cuda.synchronize()
            began, steps = time.perf_counter(), 0
            while engine.step():
                steps += 1
            torch.cuda.synchronize()
            per_step = (time.perf_counter() - began) / (steps + 1)
            results.setdefault(str(rows), {})[kind] = {"tokens/s": rows / per_step, "ms a step": 1e3 * per_step}
        results.setdefault("memory, GB", {})[kind] = held(model) / 1e9
        print(kind, json.dumps({rows: r.get(kind) for rows, r in results.items()}), flush=True)
    return results


def tables(results):
    kinds, percent = ("bf16", "int4", "fp8"), "{:.0f}".format
    moves = [[name, f"{m['ms']:.3f}", percent(100 * m["of the copy"]), f"{m['twin / ours']:.1f}"] for name, m in results["kernels"].items()]
    cases = [
        [case, *(f"{arms[k]['ms']:.3f}" for k in kinds), *(percent(100 * arms[k]["share"]) for k in kinds)]
        for case, arms in results["products"].items()
    ]
    layer = [[name, f"{arm['ms']:.1f}", percent(100 * arm["of the product's rate"])] for name, arm in results["layer"].items()]
    step, rows = results["training"], results["decoding"]
    decoding = [
        [n, *(f"{rows[n][kind]['tokens/s']:,.0f}" for kind in kinds), *(percent(rows[n][kind]["ms a step"]) for kind in kinds)]
        for n in ("1", "8", "64")
    ]
    return {
        "kernels": table(moves, ["movement", "ms", "of a copy's rate, %", "times as fast as the eager twin"]),
        "products": table(cases, ["rows", *(f"{k}, ms" for k in kinds), *(f"{k}, % of its limit" for k in kinds)]),
        "layer": table(layer, ["forward and backward", "ms", "of a large product's rate, %"]),
        "training": table(
            [[f"{step['tokens']:,}", *(percent(step[k]) for k in ("micro-batch, ms", "optimizer, ms")), f"{step['tokens/s']:,.0f}",
              percent(100 * step["of the product's rate"]), percent(step["peak memory, GB"])]],
            ["tokens", "micro-batch, ms", "optimizer, ms", "tokens/s", "of a large product's rate, %", "peak memory, GB"],
        ),
        "decoding": table(
            [*decoding, ["memory, GB", *(f"{rows['memory, GB'][k]:.2f}" for k in kinds), "", "", ""]],
            ["rows at once", *(f"{k}, tokens/s" for k in kinds), *(f"{k}, ms a step" for k in kinds)],
        ),
    }  # fmt: skip


def main():
    cli.parse(__doc__)
    if not torch.cuda.is_available():
        raise InputError("benchmarks.gpu measures a GPU, and torch sees none")
    limits = rates()
    results = {"device": f"{torch.cuda.get_device_name()}, torch {torch.__version__}", "limits": limits}
    print(json.dumps(results), flush=True)
    for name, part in {"kernels": kernels, "products": products, "layer": layer, "training": training}.items():
        results[name] = part(limits)
    results["decoding"] = decoding()
    keep("gpu", results)


if __name__ == "__main__":
    cli.run(main)
