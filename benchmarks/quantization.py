"""What quantization costs and buys: quality and size on a trained run, speed on a model that memory bounds, outliers and a rare language.

Quality (v2 Table 5) of FP32, both FP8, RTN and AWQ on held-out tasks: accuracy, the share of greedy answers that differ from FP32's, the
loss on the reference answers, and at the same places the divergence KL(FP32 || quantized), most of which a hundredth of the tokens
carry, and the probability that moved to other tokens (total variation), which no token can dominate. What depends on calibration is
measured for three seeds that change its texts. Size: the checkpoint on disk, and what the loaded model holds.

Base models (three seeds of weights, data order and calibration) show the loss without the luck of few tokens: bits per byte on new
documents in training's templates, where nearly every token is uncertain.

Speed (v2 Table 4): greedy decoding of a random model of 300M parameters at batch 1, 8 and 64, arms taking turns, prefill subtracted;
and the products a CPU could take for an int4 matrix, one by one.

A rare language and outlier channels (v3): the norms' weights of a few channels are multiplied by a factor and their consumers' columns
divided by it, which changes nothing in fp32; calibration then sees no Thai, or is chosen by `oversample` from texts where some are.
Three seeds of calibration texts.

    python -m benchmarks.quantization --run checkpoints/tiny      # half an hour on two cores
    python -m benchmarks.quantization --part speed                # one part alone: quality, base, speed or rare
"""

import copy
import dataclasses
import json
import os
import random
import statistics
import tempfile
import time
from collections import defaultdict

import matplotlib.pyplot as plt
import numpy as np
import torch

import cli
from benchmarks import RESULTS, keep, kept, quartiles, ratios, shown, timed
from benchmarks.tuning import general_model
from checkpoint import checksum, latest_stage, load_latest, load_model, save_checkpoint
from compass import CONFIGS, Compass, rope_table
from data import market
from data.tasks import fingerprint, tasks, training
from evaluate import accuracy, answer_tasks, bits_per_byte
from generate import GREEDY, generate
from kernels import dequantize_int4
from lowbit import FP8Linear, Int4Linear, LowBitLinear, load_quantized, matrices, pack, quantize_int4, with_quantized
from moe import Linear
from quantize import GROUP, POOL, calibration_pool, oversample, quantize_model
from report import save, table
from sft import chat_of
from tokenizer import Tokenizer, train_bpe
from tokenizer import train as train_tokenizer
from train import Tokenised

SEEDS, PER_TASK, PER_TASK_RARE = 3, 10, 2  # tasks of a kind and language
STEPS, NEW_DOCUMENTS = 600, 200  # of a base model's training; of each language
ARMS = {  # method, inputs that share a scale; `tiny` is so narrow that 128 are a whole row
    "RTN int4": ("rtn", GROUP), "AWQ int4": ("awq", GROUP), "RTN int4, groups of 32": ("rtn", 32), "AWQ int4, groups of 32": ("awq", 32),
    "FP8, naive": ("fp8-naive", GROUP), "FP8, expert-aware": ("fp8", GROUP),
}  # fmt: skip
SEARCHED = ("awq", "fp8")  # the others do not depend on calibration
LARGE = dataclasses.replace(
    CONFIGS["small"], n_layers=12, n_heads=16, n_kv_heads=4, n_experts=16, expert_dim=384, vocab_size=8192, max_seq_len=1024
)  # fmt: skip
BATCHES, NEW, ROUNDS = (1, 8, 64), 16, 5
PRODUCT, PRODUCT_ROWS = (768, 1024), (1, 8, 16, 64, 128)  # one matrix (F, D), rows of x
RARE, NARROW, CHANNELS, FACTORS = "th", 8, 4, (1, 100, 100_000)


def held(model):
    """Bytes of a model's parameters and of its quantized tensors in every form it keeps."""
    packed = [t for m in model.modules() if isinstance(m, Int4Linear) and m.packed for pair in m.packed for t in pair]
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers(), *packed])


def on_disk(model, dtype):
    """Bytes of its checkpoint, what is not quantized in `dtype`."""
    model = copy.deepcopy(model)
    for p in model.parameters():
        p.data = p.data.to(dtype)
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(os.path.join(folder, "step_0.pt"), model)
        return os.path.getsize(os.path.join(folder, "step_0.pt"))


def reloaded(model):
    """The model as a user gets it: saved, loaded, packed."""
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(os.path.join(folder, "quantized", "step_0.pt"), model)
        return load_quantized(load_latest(folder, "quantized"))


def conversations(tasks, tokenizer, context):
    """[(lang, ids (1, T), mask (T - 1,) of the answer's tokens), …] of tasks with their reference answers."""
    samples = []
    for task in tasks:
        ids, mask = tokenizer.encode_chat(chat_of(task, thinking="think" in task), thinking="think" in task)
        if len(ids) <= context:
            samples.append((task["lang"], torch.tensor([ids]), torch.tensor(mask[1:], dtype=torch.bool)))
    return samples


@torch.inference_mode()
def answer_logprobs(model, samples):
    """Log-probabilities (A, V) at the A answer tokens of each sample."""
    return [model(ids_1T)[0, :-1][mask_T].float().log_softmax(-1) for _, ids_1T, mask_T in samples]


def damage(model, exact, samples):
    """({lang: loss}, {lang: divergence}, {lang: moved}) per token of the reference answers: nats, KL(exact || model) in nats, exact from
    FP32, and the share of probability that stands on other tokens than in exact."""
    sums = defaultdict(lambda: torch.zeros(4))
    for (lang, ids_1T, mask_T), logp_AV, exact_AV in zip(samples, answer_logprobs(model, samples), exact, strict=True):
        nll, p_AV = -logp_AV.gather(1, ids_1T[0, 1:][mask_T].unsqueeze(1)).sum(), exact_AV.exp()
        moved = (p_AV - logp_AV.exp()).abs().sum() / 2
        sums[lang] += torch.stack([nll, (p_AV * (exact_AV - logp_AV)).sum(), moved, mask_T.sum()])
    return tuple({lang: (s[i] / s[3]).item() for lang, s in sums.items()} for i in range(3))


@torch.inference_mode()
def layer_errors(model, quantized, samples):
    """Of each layer |dy| / |y|, y what it adds to the residual stream, on the exact model's inputs: held-out conversations."""
    sums_L2 = torch.zeros(len(model.blocks), 2)
    for _, ids_1T, _ in samples:
        positions_1T, c = torch.arange(ids_1T.shape[1]).unsqueeze(0), model.config
        x_BTD, rope = model.embedding(ids_1T), rope_table(positions_1T, c.head_dim, c.rope_base)
        for sums_2, block, rounded in zip(sums_L2, model.blocks, quantized.blocks, strict=True):
            y_BTD = block(x_BTD, rope, None)[0]
            sums_2 += torch.stack([(rounded(x_BTD, rope, None)[0] - y_BTD).square().sum(), (y_BTD - x_BTD).square().sum()])
            x_BTD = y_BTD
    return (sums_L2[:, 0] / sums_L2[:, 1]).sqrt().tolist()


def measure(model, exact, tokenizer, test, samples, reference=None):
    """{"loss", "divergence", "moved", "accuracy", "by_task", "differ", "answers"}: means over languages; share of answers unlike the
    reference's."""
    loss, divergence, moved = (statistics.mean(by_language.values()) for by_language in damage(model, exact, samples))
    answers = [answer for _, answer in answer_tasks(model, tokenizer, test, thinking=True)]
    differ = sum(a != b for a, b in zip(answers, reference or answers, strict=True)) / len(answers)
    right = accuracy(test, answers)
    return {"loss": loss, "divergence": divergence, "moved": moved, "accuracy": right["overall"], "by_task": right["by_task"],
            "differ": differ, "answers": answers}  # fmt: skip


def quality(model, tokenizer, dtype):
    test, context = tasks("test", 0, PER_TASK), model.config.max_seq_len
    samples = conversations(test, tokenizer, context)
    exact = answer_logprobs(model, samples)
    full = measure(model, exact, tokenizer, test, samples)
    results = {"FP32": {"disk": on_disk(model, dtype), "memory": held(model), "runs": [full]}}
    for name, (method, group) in ARMS.items():
        runs = []
        for seed in range(SEEDS if method in SEARCHED else 1):
            pool = calibration_pool(tokenizer, None, context, seed)
            quantized = quantize_model(model, [pool[i] for i in oversample(model, pool)], method, group, seed)
            errors = layer_errors(model, quantized, samples[::5])
            disk, packed = on_disk(quantized, dtype), reloaded(quantized)
            runs.append({**measure(packed, exact, tokenizer, test, samples, full["answers"]), "layer errors": errors})
            print(name, {key: round(value, 4) for key, value in runs[-1].items() if isinstance(value, float)}, errors, flush=True)
        results[name] = {"disk": disk, "memory": held(packed), "runs": runs}
    for result in results.values():
        for run in result["runs"]:
            del run["answers"]
    return {"tasks_hash": fingerprint(test), "tasks": len(test), "arms": results}


def base():
    """{arm: [bits per byte of each seed's model]}, means over languages."""
    documents, new = list(market.documents("general", 0)), list(market.documents("general", 1, per_language=NEW_DOCUMENTS))
    config = CONFIGS["tiny"]
    tokenizer = train_tokenizer(documents, config.vocab_size)
    tokenised, results = Tokenised(documents, tokenizer), defaultdict(list)
    for seed in range(SEEDS):
        model = general_model(config, tokenised, STEPS, seed)
        texts = [tokenizer.encode(d["text"])[: config.max_seq_len] for d in random.Random(seed).sample(documents, POOL)]
        pool = [torch.tensor([ids]) for ids in texts]
        pool = [pool[i] for i in oversample(model, pool)]
        for name in ("FP32", *ARMS):
            made = reloaded(quantize_model(model, pool, *ARMS[name], seed)) if name in ARMS else model
            with torch.inference_mode():
                results[name].append(statistics.mean(bits_per_byte(made, tokenizer, new).values()))
            print(f"seed {seed}, {name}: {results[name][-1]:.4f} bits per byte", flush=True)
    return results


def large_models():
    """{arm: random model}: FP32; int4 and FP8 numbers drawn directly, AWQ's and FP8's with the input scales that a search leaves."""
    torch.manual_seed(0)
    models = {"FP32": Compass(LARGE).eval()}
    sizes, weights = matrices(LARGE), {"RTN int4": {}, "AWQ int4": {}, "FP8": {}}
    for name, (E, F, D) in sizes.items():
        c, scale = None if name.endswith("down") else torch.ones(E, D, dtype=torch.bfloat16), D**-0.5 / 4.6
        stored = torch.randint(256, (E, F, D // 2), dtype=torch.uint8), torch.full((E, F, D // GROUP), scale, dtype=torch.bfloat16)
        stored = *stored, torch.full((E, F, D // GROUP), 8, dtype=torch.uint8)
        weights["RTN int4"][name], weights["AWQ int4"][name] = Int4Linear(*stored), Int4Linear(*stored, c)
        weights["FP8"][name] = FP8Linear(torch.randn(E, F, D).to(torch.float8_e4m3fn), torch.full((E, F), D**-0.5), c)
    kept = {name: p for name, p in models["FP32"].named_parameters() if not name.startswith(tuple(sizes))}
    kept = {name: p.detach() for name, p in kept.items() if not name.endswith(("ED2F", "EFD"))}
    return models | {name: with_quantized(LARGE, modules, kept) for name, modules in weights.items()}


def read_for_a_token(model):
    """Bytes of the weights that one token goes through."""
    c, total = model.config, 0.0
    for name, p in model.named_parameters():  # of the embedding one row is read
        total += p.nbytes * (c.top_k / c.n_experts if name.endswith(("ED2F", "EFD")) else name != "embedding.weight")
    for module in model.modules():
        if isinstance(module, LowBitLinear):
            E, *_ = module.weight_fp8.shape if isinstance(module, FP8Linear) else module.qweight.shape
            tensors = module.buffers() if isinstance(module, FP8Linear) else [t for pair in module.packed for t in pair]
            total += sum(t.nbytes for t in tensors) * (c.top_k / E if E > 1 else 1)
    return total


def products():
    """{product: {rows: microseconds}} of one matrix: what `Int4Linear` and `FP8Linear` could take on this CPU."""
    weight_FD = torch.randn(PRODUCT, generator=torch.Generator().manual_seed(0))
    qweight, scales, zeros = quantize_int4(weight_FD, GROUP)
    layer = Int4Linear(qweight[None], scales[None].bfloat16(), zeros[None].to(torch.uint8))
    layer.pack()
    stored, (packed, scales_and_offsets) = (layer.qweight[0], layer.scales[0], layer.zeros[0]), layer.packed[0]
    half_FD, step_F1 = weight_FD.bfloat16(), weight_FD.abs().amax(1, keepdim=True) / 127
    eight_FD, step_F = (weight_FD / step_F1).round().to(torch.int8), step_F1.squeeze(1).bfloat16()
    linear = Linear(*reversed(PRODUCT))
    linear.weight.data = weight_FD
    compiled = torch.compile(lambda x_ND: x_ND @ dequantize_int4(*stored).T, dynamic=False)
    results = defaultdict(dict)
    for rows in PRODUCT_ROWS:
        x_ND = torch.randn(rows, PRODUCT[1])
        half_ND = x_ND.bfloat16()
        arms = {
            "fp32": lambda x=x_ND: x @ weight_FD.T,
            "fp32, divided among the threads": lambda x=x_ND: linear(x),
            "bf16": lambda x=half_ND: x @ half_FD.T,
            "bf16 to fp32, then the product": lambda x=x_ND: x @ half_FD.float().T,
            "torch's int8": lambda x=half_ND: torch._weight_int8pack_mm(x, eight_FD, step_F),
            "torch's int4": lambda x=half_ND: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, scales_and_offsets),
            "int4 to bf16, then the product": lambda x=half_ND: x @ dequantize_int4(*stored).T,
            "the same, compiled": lambda x=half_ND: compiled(x),
            "int4 to fp32, then the product": lambda x=x_ND: x @ dequantize_int4(*stored).float().T,
        }
        with torch.inference_mode():
            for name, seconds in timed(arms, 50).items():
                results[name][rows] = [1e6 * value for value in quartiles(seconds)]
    print(json.dumps(results), flush=True)
    return results


def speed():
    """Greedy decoding: {"disk", "memory", "read": {arm: bytes of its file, held, read for a token}, "limit": quartiles of the bytes/s of a
    sum of 1.2 GB, "tokens/s", "times FP32": {arm: {batch: quartiles}}, "products"}, rates by the NEW steps between one token and 1 + NEW in
    each of ROUNDS, after a round that does not count."""
    tokenizer, models = Tokenizer(train_bpe([d["text"] for d in market.documents("general", 0, per_language=30)], 500)), large_models()
    disk = {name: on_disk(model, torch.float32) for name, model in models.items()}
    with torch.no_grad():  # no answer stops early: the stop tokens' logits are 0, never the largest
        for model in models.values():
            pack(model)
            model.head.weight[list(tokenizer.special.values())] = 0
    rates, times = ({name: {} for name in models} for _ in range(2))
    for batch in BATCHES:
        prompts, seconds = [[1 + row, 7, 9, 300] for row in range(batch)], defaultdict(list)
        for turn in range(1 + ROUNDS):
            for name, model in models.items():
                for tokens in (1, 1 + NEW):  # the difference is NEW steps, without the prefill
                    began = time.perf_counter()
                    made = generate(model, tokenizer, prompts, dataclasses.replace(GREEDY, max_tokens=tokens), max_rows=batch)
                    if turn:
                        seconds[name, tokens].append(time.perf_counter() - began)
                    assert all(len(completion.ids) == tokens for completion in made)
        spent = {name: [more - one for one, more in zip(seconds[name, 1], seconds[name, 1 + NEW], strict=True)] for name in models}
        for name in models:
            rates[name][batch], times[name][batch] = quartiles([batch * NEW / s for s in spent[name]]), ratios(spent["FP32"], spent[name])
        print(batch, {name: shown(rates[name][batch], 1) for name in models}, flush=True)
    large = torch.randn(300_000_000)
    limit = quartiles([large.nbytes / s for s in timed({"sum": large.sum}, 10)["sum"]])
    memory, read = ({name: size_of(model) for name, model in models.items()} for size_of in (held, read_for_a_token))
    sizes = {"disk": disk, "memory": memory, "read": read}
    return {"threads": torch.get_num_threads(), **sizes, "limit": limit, "tokens/s": rates, "times FP32": times, "products": products()}


@torch.no_grad()
def with_outliers(model, factor):
    """The same function with `factor` times larger activations in a few channels after both norms of every layer."""
    model, channels = copy.deepcopy(model), random.Random(0).sample(range(model.config.dim), CHANNELS)
    for block in model.blocks:
        moe = block.feed_forward
        block.attention_norm.weight[channels] *= factor
        block.feed_forward_norm.weight[channels] *= factor
        for weight in (block.attention.qkv.weight, moe.router.weight, moe.shared.gate_up.weight):
            weight[:, channels] /= factor
        moe.gate_up_ED2F[:, channels] /= factor
    return model


def rare(model, tokenizer):
    """{factor: {arm: {"divergence", "loss": {lang: [nats a token of each seed]}, "texts", "least": [of each seed]}}}.

    Narrow calibration sees NARROW conversations, none of them in Thai; expert-aware calibration adds what `oversample` takes from 492 more,
    16 of them in Thai. least: tokens that the rarest expert of a layer saw. Arms that do not depend on calibration have one seed.
    """
    context, results = model.config.max_seq_len, {factor: {} for factor in FACTORS}
    samples = conversations(tasks("test", 0, PER_TASK_RARE), tokenizer, context)
    exact = answer_logprobs(model, samples)
    for seed in range(SEEDS):
        texts = training(seed, 128)
        random.Random(seed).shuffle(texts)
        plain, thai = ([t for t in texts if (t["lang"] == RARE) == wanted] for wanted in (False, True))
        more = plain[NARROW:484] + thai[:16]
        random.Random(seed + 1).shuffle(more)
        pool = [ids for _, ids, _ in conversations(plain[:NARROW] + more, tokenizer, context)]
        for factor, made in results.items():
            changed = with_outliers(model, factor)
            wide = [pool[i] for i in oversample(changed, pool, first=NARROW)]
            arms = {} if seed else {"RTN int4": ("rtn", wide), "FP8, naive": ("fp8-naive", wide)}
            for name, method in (("AWQ int4", "awq"), ("FP8, smoothed", "fp8")):
                arms |= {f"{name}, calibrated without Thai": (method, pool[:NARROW]), f"{name}, expert-aware": (method, wide)}
            for name, (method, batches) in arms.items():
                arm, found = quantize_model(changed, batches, method), made.setdefault(name, defaultdict(lambda: defaultdict(list)))
                for key, by_language in zip(("loss", "divergence"), damage(reloaded(arm), exact, samples), strict=False):
                    for lang, value in by_language.items():
                        found[key][lang].append(value)
                found["calibration"]["texts"].append(len(batches))
                found["calibration"]["least"].append(min(entry["tokens"] for entry in arm.report))
                print(seed, factor, name, {lang: round(values[-1], 5) for lang, values in found["divergence"].items()}, flush=True)
    return results


def plot(results, path):
    """Quality against size, decoding speed, and the loss that outliers cost."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2))
    if "quality" in results:
        for name, arm in results["quality"]["arms"].items():
            values = [run["divergence"] for run in arm["runs"]]
            axes[0].errorbar(arm["disk"] / 1e6, statistics.mean(values), (max(values) - min(values)) / 2, fmt="o", capsize=3, label=name)
        axes[0].set(xlabel="MB on disk (FP32: as bf16)", ylabel="divergence from FP32, nats a token", title="quality and size")
        axes[0].legend(fontsize=8)
    if "speed" in results:
        for i, (name, by_batch) in enumerate(results["speed"]["times FP32"].items()):
            times = [median for _, median, _ in by_batch.values()]
            axes[1].bar([x + 0.21 * (i - 1.5) for x in range(len(times))], times, 0.2, label=name)
        axes[1].set_xticks(range(len(BATCHES)), [f"batch {batch}" for batch in BATCHES])
        axes[1].set(ylabel="speed, times that of FP32", title="decoding, random model of 300M")
        axes[1].legend(fontsize=8)
    if "rare" in results:
        factor = max(results["rare"], key=int)
        arms = results["rare"][factor]
        for lang in sorted(arms["RTN int4"]["divergence"], key=lambda lang: lang == RARE):
            cost, style = [statistics.mean(arm["divergence"][lang]) for arm in arms.values()], "C1s" if lang == RARE else "C0o"
            axes[2].plot(cost, range(len(cost)), style, label="Thai" if lang == RARE else None)
        axes[2].set_yticks(range(len(arms)), arms, fontsize=8)
        axes[2].grid(alpha=0.4)
        title = f"{CHANNELS} outlier channels, times {int(factor):,}"
        axes[2].set(xscale="log", xlabel="divergence from FP32, nats a token; a dot a language", title=title)
        axes[2].legend(fontsize=8)
    save(figure, path)


def tables(results):
    """Only of the parts that have been measured."""
    made = {}
    if "speed" in results:
        measured, rows = results["speed"], []
        rates, (_, limit, _), products = measured["tokens/s"], measured["limit"], measured["products"]
        for name, by_batch in rates.items():
            cells = (f"{shown(rate, 1)}; {measured['times FP32'][name][batch][1]:.2f} ×" for batch, rate in by_batch.items())
            weights = measured["read"][name] * by_batch[str(BATCHES[0])][1]
            sizes = (f"{measured[kind][name] / 1e6:.0f}" for kind in ("disk", "memory"))
            rows.append([name, *sizes, *cells, f"{weights / 1e9:.1f} ({100 * weights / limit:.0f} %)"])
        header = ["tokens/s", "MB on disk", "in memory", *(f"batch {batch}" for batch in rates["FP32"])]
        made["speed"] = table(rows, [*header, f"weights read at batch 1, GB/s (of {limit / 1e9:.1f})"])
        rows = [[name, *(shown(micro) for micro in by_rows.values())] for name, by_rows in products.items()]
        made["products"] = table(rows, ["microseconds, rows", *products["fp32"]])
    if "quality" in results:
        columns, rows, tasks_of = {"loss": (1, 4), "divergence": (1, 5), "moved": (100, 3), "accuracy": (100, 1)}, [], {}
        for name, arm in results["quality"]["arms"].items():
            cells = (", ".join(f"{k * run[key]:.{d}f}" for run in arm["runs"] if key in run) for key, (k, d) in columns.items())
            errors = ("/".join(f"{100 * error:.1f}" for error in run["layer errors"]) for run in arm["runs"] if "layer errors" in run)
            rows.append([name, f"{arm['disk'] / 1e6:.2f}", f"{arm['memory'] / 1e6:.2f}", *cells, ", ".join(errors)])
            for task in arm["runs"][0]["by_task"]:
                tasks_of.setdefault(task, []).append(statistics.mean(100 * run["by_task"][task] for run in arm["runs"]))
        header = ["", "MB on disk", "in memory", "loss", "divergence", "probability moved, %", "accuracy, %", "layer errors, %"]
        made["quality"] = table(rows, header)
        rows = [[task, *(f"{value:.1f}" for value in values)] for task, values in tasks_of.items()]
        made["tasks"] = table(rows, ["accuracy, %", *results["quality"]["arms"]])
    if "base" in results:
        rows = []
        for name, bits in results["base"].items():
            above = (f"{1000 * (mine - exact):+.1f}" for mine, exact in zip(bits, results["base"]["FP32"], strict=True))
            rows.append([name, ", ".join(f"{value:.4f}" for value in bits), "" if name == "FP32" else ", ".join(above)])
        made["base"] = table(rows, ["", "bits per byte, new documents", "above FP32, thousandths"])
    if "rare" in results:
        rows = []
        for factor, arms in results["rare"].items():
            for name, arm in arms.items():
                thai, others = arm["divergence"][RARE], [values for lang, values in arm["divergence"].items() if lang != RARE]
                cells = (", ".join(f"{1000 * value:.1f}" for value in values) for values in (np.mean(others, axis=0), thai))
                least = ", ".join(map(str, arm["calibration"]["least"]))
                by_language = (f"{1000 * statistics.mean(values):.1f}" for values in arm["divergence"].values())
                rows.append([f"{int(factor):,}", name, *cells, *by_language, least])
        sides = "seven others", "Thai", *(f"mean, {lang}" for lang in arm["divergence"])
        made["rare"] = table(rows, ["outliers, times", "divergence, thousandths of a nat", *sides, "tokens of the rarest expert"])
    return made


def main():
    args = cli.parse(
        __doc__, "run", run=dict(default="checkpoints/tiny"), part=dict(default="all", choices=("all", "quality", "base", "speed", "rare"))
    )  # fmt: skip
    results = {} if args.part == "all" else kept("quantization")  # one part is measured anew, the others stay
    if args.part in ("all", "speed"):
        results["speed"] = speed()
    if args.part in ("all", "base"):
        results["base"] = base()
    if args.part in ("all", "quality", "rare"):
        tokenizer, state = Tokenizer.load(args.run), load_latest(args.run, latest_stage(args.run))
        model, dtype = load_model(state).eval(), state["model"]["embedding.weight"].dtype
        asked = {"run": args.run, "stage": state["stage"], "step": state["step"], "sha256": checksum(state["path"])}
        if args.part != "rare":
            results["quality"] = quality(model, tokenizer, dtype) | {"checkpoint": asked}
        if args.part != "quality":
            results["rare"] = rare(model, tokenizer)
            results["rare's checkpoint"] = asked
    results = keep("quantization", results)
    plot(results, os.path.join(RESULTS, "quantization.png"))
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    cli.run(main)
