"""lowbit.py and quantize.py: formats held against torch's own, layers against dequantised products, searches never worse than rounding."""

import copy
import dataclasses
import functools
import json
import os
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kernels
import lowbit
import quantize
from checkpoint import is_quantized, latest_stage, load_checkpoint, load_latest, load_model, save_checkpoint
from cli import write_atomically
from compass import CONFIGS, Compass, rope_table
from generate import GREEDY, generate, load_for_inference
from kernels import fp8_matmul, fp8_matmul_reference, int4_matmul, int4_matmul_reference, unpack_int4
from lowbit import FP8Linear, Int4Linear, load_quantized, matrices, pack
from quantize import (
    METHODS,
    calibration_pool,
    dequantize_fp8,
    dequantize_int4,
    input_scales,
    layer_inputs,
    oversample,
    quantize_fp8,
    quantize_int4,
    quantize_model,
)
from tests.test_kernels import interpreted


@functools.cache
def model():
    """Two layers whose activations have outlier channels, as those of trained models have."""
    torch.manual_seed(0)
    made = Compass(
        dataclasses.replace(
            CONFIGS["tiny_v3"], n_layers=2, dim=64, n_heads=4, n_kv_heads=2, head_dim=16, n_experts=4, top_k=2, n_shared=1,
            expert_dim=32, vocab_size=512, max_seq_len=64,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for block in made.blocks:
            for norm in (block.attention_norm, block.feed_forward_norm):
                norm.weight[[3, 40]] = 20.0
            block.attention.qkv.weight[:, [3, 40]] /= 20
            block.feed_forward.router.weight[:, [3, 40]] /= 20
            block.feed_forward.gate_up_ED2F[:, [3, 40]] /= 20
            block.feed_forward.shared.gate_up.weight[:, [3, 40]] /= 20
    return made


def batches(seed, n=7, rows=1, length=64):
    return list(torch.randint(512, (n, rows, length), generator=torch.Generator().manual_seed(seed)))


@functools.cache
def quantized(method):
    return quantize_model(model(), batches(0), method)


def matrices_of_all_kinds():
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(2, 24, 64, generator=g)
    special = torch.randn(2, 24, 64, generator=g)
    special[0, 0], special[0, 1], special[0, 2] = 0.0, special[0, 1].abs() + 3, -special[0, 2].abs() - 3
    special[0, 3], special[0, 4, 0], special[1] = 7.25, 1e4, special[1] * 1e-6
    return [normal, special]


def test_int4_by_hand():
    qweight, scales, zeros = quantize_int4(torch.tensor([[-0.5, 0.0, 1.0, 7.0]]), 4)  # steps of 7.5 / 15
    assert scales.tolist() == [[0.5]] and zeros.tolist() == [[1.0]]
    assert qweight.tolist() == [[0 | 1 << 4, 3 | 15 << 4]] and qweight.dtype == torch.uint8
    assert dequantize_int4(qweight, scales, zeros).tolist() == [[-0.5, 0.0, 1.0, 7.0]]


def test_int4_round_trip_is_exact():
    g = torch.Generator().manual_seed(1)
    q = torch.randint(0, 16, (3, 8, 64), generator=g)
    q[..., 0::32], q[..., 1::32] = 0, 15  # each group uses its whole range
    zeros, scales = torch.randint(0, 16, (3, 8, 2), generator=g).float(), 2.0 ** torch.randint(-9, 3, (3, 8, 2), generator=g)
    weight = ((q.unflatten(-1, (2, 32)) - zeros.unsqueeze(-1)) * scales.unsqueeze(-1)).flatten(-2)
    qweight, found_scales, found_zeros = quantize_int4(weight, 32)
    assert torch.equal(unpack_int4(qweight), q.to(torch.uint8))
    assert torch.equal(found_scales, scales) and torch.equal(found_zeros, zeros)
    assert torch.equal(dequantize_int4(qweight, found_scales, found_zeros), weight)


@pytest.mark.parametrize("group", [16, 32, 64])
def test_int4_error_and_torchs_fake_quantize(group):
    for weight in matrices_of_all_kinds():
        qweight, scales, zeros = quantize_int4(weight, group)
        assert torch.equal(scales, scales.bfloat16().float()) and torch.equal(zeros, zeros.to(torch.uint8).float())
        rounded = dequantize_int4(qweight, scales, zeros)
        step = scales.repeat_interleave(group, -1)
        assert ((rounded - weight).abs() <= step * 0.5001).all()
        theirs = torch.fake_quantize_per_channel_affine(weight.reshape(-1, group), scales.flatten(), zeros.flatten().int(), 0, 0, 15)
        differ = (theirs.view_as(weight) - rounded).abs() > 1e-6 * step
        assert differ.float().mean() < 1e-3  # they multiply by 1 / scale, we divide: a tie may fall to the other side
        assert ((theirs.view_as(weight) - rounded).abs() <= 1.0001 * step).all()


def test_fp8_error():
    for weight in matrices_of_all_kinds():
        weight_fp8, scale = quantize_fp8(weight)
        error = (dequantize_fp8(weight_fp8, scale) - weight).abs()
        # three bits after the leading one; below 2^-6 steps of 2^-9
        assert (error <= torch.maximum(weight.abs() / 16, scale.unsqueeze(-1) / 1024) * 1.0001).all()


def test_fp8_product_equals_torchs():
    g = torch.Generator().manual_seed(2)
    x, (weight_fp8, scale) = torch.randn(20, 64, generator=g), quantize_fp8(torch.randn(48, 64, generator=g))
    x_fp8, x_scale = kernels.quantise_rows(x)
    theirs = torch._scaled_mm(x_fp8, weight_fp8.T, x_scale.unsqueeze(1), scale.unsqueeze(0), out_dtype=torch.float32)
    torch.testing.assert_close(fp8_matmul(x, weight_fp8, scale), theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(FP8Linear(weight_fp8[None], scale[None])(x), theirs, rtol=1e-5, atol=1e-5)


def linear_case(kind, E=4, out=48, inner=64, group=32):
    """A quantized layer with input scales, and the plain numbers it stands for."""
    g = torch.Generator().manual_seed(3)
    weight, input_scale = torch.randn(E, out, inner, generator=g), (torch.rand(E, inner, generator=g) + 0.5).bfloat16()
    if kind is Int4Linear:
        qweight, scales, zeros = quantize_int4(weight, group)
        return Int4Linear(qweight, scales.bfloat16(), zeros.to(torch.uint8), input_scale), dequantize_int4(qweight, scales, zeros)
    weight_fp8, scale = quantize_fp8(weight)
    return FP8Linear(weight_fp8, scale, input_scale), dequantize_fp8(weight_fp8, scale)


@pytest.mark.parametrize("kind", [Int4Linear, FP8Linear])
def test_layers_multiply_what_they_stand_for(kind):
    layer, weight = linear_case(kind)
    counts = torch.tensor([1, 0, 150, 9])  # one row, none, more than UNPACK
    x = torch.randn(160, 64, generator=torch.Generator().manual_seed(4))
    expected = []
    for e, rows in enumerate(x.split(counts.tolist())):
        rows = rows * layer.input_scale[e].float()
        if kind is FP8Linear:
            rows = dequantize_fp8(*kernels.quantise_rows(rows))
        expected.append(rows @ weight[e].T)
    expected = torch.cat(expected)
    torch.testing.assert_close(layer(x, counts), expected, rtol=1e-4, atol=1e-4)
    layer.pack()
    assert kind is FP8Linear or layer.packed is not None
    packed = layer(x, counts)
    assert packed.dtype == torch.float32 and (packed - expected).abs().max() < 1e-2 * expected.abs().max()
    assert torch.equal(layer(x.T.contiguous().T, counts), packed)  # in any order in memory
    one = kind(**{name: tensor[:1] for name, tensor in linear_case(kind)[0].named_buffers()})
    torch.testing.assert_close(one(x.view(2, 80, 64)).flatten(0, 1)[:1], expected[:1], rtol=1e-4, atol=1e-4)


def test_the_kernel_takes_the_stored_tensors():
    """bf16 scales and byte-sized zeros: interpreted, equal to the eager twin."""
    code = (
        "import torch, kernels, tests.test_quantize as t\n"
        "from lowbit import Int4Linear\n"
        "layer, weight = t.linear_case(Int4Linear)\n"
        "x, counts = torch.randn(20, 64), torch.tensor([3, 0, 16, 1])\n"
        "y = layer(x, counts)\n"
        "kernels.use_triton = lambda x: False\n"
        "torch.testing.assert_close(y, layer(x, counts), rtol=1e-4, atol=1e-4); print('same')"
    )
    assert interpreted(code) == "same"


def inputs_of(made, tokens):
    """{name: x that enters each attention.qkv, attention.out and feed_forward of the fp32 model}."""
    seen, hooks = {}, []
    for i, block in enumerate(made.blocks):
        for name in ("attention.qkv", "attention.out", "feed_forward"):
            key = f"blocks.{i}.{name}"
            hooks.append(block.get_submodule(name).register_forward_pre_hook(lambda _, args, key=key: seen.update({key: args[0]})))
    with torch.no_grad():
        made(tokens)
    for hook in hooks:
        hook.remove()
    return seen


def layer_errors(method, tokens):
    errors = {}
    for name, x in inputs_of(model(), tokens).items():
        ours, exact = (made.get_submodule(name)(x) for made in (quantized(method), model()))
        ours, exact = (y[0] if isinstance(y, tuple) else y for y in (ours, exact))
        errors[name] = ((ours - exact).norm() / exact.norm()).item()
    return errors


@torch.no_grad()
def test_awq_beats_rounding_in_every_layer():
    calibration, unseen = torch.cat(batches(0)), torch.cat(batches(9))
    for tokens in (calibration, unseen):
        awq, rtn = layer_errors("awq", tokens), layer_errors("rtn", tokens)
        assert all(awq[name] < rtn[name] for name in rtn), (awq, rtn)
    assert layer_errors("fp8", unseen)["blocks.0.feed_forward"] < rtn["blocks.0.feed_forward"] / 2


@pytest.mark.parametrize("method", METHODS)
def test_search_is_never_worse(method):
    report = quantized(method).report
    assert len(report) == 2 * (2 + 2 * 4 + 2)
    assert all(entry["after"] <= entry["before"] for entry in report)
    searched = method in ("awq", "fp8")
    assert any(entry["alpha"] > 0 and entry["after"] < entry["before"] for entry in report) == searched
    if method != "fp8-naive":  # the reported error is that of the layer as it runs
        errors = layer_errors(method, torch.cat(batches(0)))
        reported = {f"blocks.{e['layer']}.attention.{e['matrix']}": e["after"] for e in report if e["expert"] is None}
        assert {name: errors[name] for name in reported} == pytest.approx(reported, rel=1e-3)


def test_clips_are_the_best_of_all():
    """One group a row, so that its error is the output's; one column is large where inputs are small: its range does not pay."""
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(24, 32, generator=g), torch.randn(300, 32, generator=g)
    weight[:, 5] *= 4
    x[:, 5] *= 0.01

    def errors(clip):
        return quantize.row_errors(weight, quantize.round_weight(weight, "awq", 32, clip)[1], x, "awq")

    clip = quantize.best_clips(weight, x, 32)
    best = torch.stack([errors(share) for share in quantize.CLIPS]).min(0).values
    torch.testing.assert_close(errors(clip), best, rtol=1e-4, atol=1e-4)
    assert (clip < 1).sum() > 12 and (best < errors(1.0)).sum() > 12  # of 24 rows


def test_queries_and_keys_are_not_clipped():
    """Their scales are those of the whole range of each group (64 inputs); values, some of them, have a smaller one."""
    for mine, block in zip(quantized("awq").blocks, model().blocks, strict=True):
        attention, qkv = block.attention, mine.attention.qkv
        c_D = 1.0 if qkv.input_scale is None else qkv.input_scale[0].float()
        whole = quantize_int4(attention.qkv.weight / c_D, 64)[1]
        qk = (attention.H + attention.G) * attention.C
        assert torch.equal(qkv.scales[0, :qk].float(), whole[:qk]) and (qkv.scales[0, qk:].float() < whole[qk:]).sum() > 3


def test_input_scales_by_hand():
    x, weight = torch.tensor([[1.0, -16.0], [-1.0, 16.0]]), torch.tensor([[4.0, 1.0], [0.5, 1.0]])
    scales = {(method, alpha): c.tolist() for method in ("awq", "fp8") for alpha, c in input_scales(weight, x, method)}
    assert scales["awq", 0.0] == scales["fp8", 0.0] == [1.0, 1.0]
    assert scales["awq", 0.5] == [2.0, 0.5]  # (mean |x|)^-1/2 is (1, 1/4), centred to a product of one
    assert scales["fp8", 0.5] == pytest.approx([8**0.5, 8**-0.5], rel=4e-3)  # sqrt(max |W| / max |x|) is (2, 1/4); stored in bf16
    assert len(scales) == 40 and len(input_scales(weight, x, "rtn")) == len(input_scales(weight, x, "fp8-naive")) == 1


class Exact(nn.Module):
    """In place of Int4Linear: the very weights, E of them, with input scales."""

    def __init__(self, weight, input_scale=None):
        super().__init__()
        self.weight, self.input_scale = weight, input_scale

    def forward(self, x, counts_E=None):
        rows, counts = x.reshape(-1, x.shape[-1]), [x.numel() // x.shape[-1]] if counts_E is None else counts_E.tolist()
        scale = torch.ones(len(counts), x.shape[-1]) if self.input_scale is None else self.input_scale.float()
        y = torch.cat([(r * c) @ w.T for r, c, w in zip(rows.split(counts), scale, self.weight, strict=True)])
        return y.unflatten(0, x.shape[:-1])


@torch.no_grad()
def test_scales_and_folding_change_nothing_by_themselves(monkeypatch):
    def some_scale(weight_FD, x_ND, method):
        g = torch.Generator().manual_seed(weight_FD.shape[1])
        return [(0.5, (torch.rand(weight_FD.shape[1], generator=g) + 0.5).bfloat16().float())]

    monkeypatch.setattr(quantize, "round_weight", lambda weight_FD, *_: ({"weight": weight_FD}, weight_FD))
    monkeypatch.setattr(quantize, "input_scales", some_scale)
    monkeypatch.setattr(quantize, "Int4Linear", Exact)
    unrounded, tokens = quantize_model(model(), batches(0), "rtn"), torch.cat(batches(1))
    assert isinstance(unrounded.blocks[0].attention.qkv, Exact) and unrounded.blocks[0].feed_forward.down.input_scale is None
    torch.testing.assert_close(unrounded(tokens), model()(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_rest_is_untouched(method):
    made = dict(quantized(method).named_parameters())
    kept = {name: p for name, p in model.__wrapped__().named_parameters() if name in made}  # not the one whose tensors it shares
    assert set(made) == set(kept) and all(torch.equal(made[name], p) for name, p in kept.items())
    for part in ("embedding.weight", "head.weight", "norm.weight", "blocks.1.feed_forward.router.weight", "blocks.0.attention_norm.weight"):
        assert part in made
    assert any(name.startswith("mtp.") for name in made)
    assert {n for n, m in quantized(method).named_modules() if isinstance(m, (Int4Linear, FP8Linear))} == set(matrices(model().config))


def test_the_pool_of_the_marketplace_is_half_chats_and_thoughts(micro_tokenizer):
    pool, special = calibration_pool(micro_tokenizer, None, 1024, 0, n=64), set(micro_tokenizer.special.values())
    assert [ids_1T[0, 0].item() in special for ids_1T in pool] == [False, True] * 32
    assert any(micro_tokenizer.special["<think>"] in ids_1T for ids_1T in pool)


@torch.no_grad()
def test_each_expert_is_calibrated_on_its_own_tokens(monkeypatch):
    """Counts and input scales of the report, from the router's choices of the full-precision model."""
    monkeypatch.setattr(quantize, "MINIMUM", 1)
    made, block, tokens = quantize_model(model(), batches(0), "awq"), model().blocks[0], torch.cat(batches(0))
    rope = rope_table(torch.arange(64).unsqueeze(0), block.attention.C, model().config.rope_base)
    _, inputs, index_NK = layer_inputs(block, [model().embedding(tokens)], [rope])
    for entry in made.report:
        if entry["layer"] == 0 and entry["matrix"] == "gate_up" and entry["expert"] != "shared":
            own_ND = inputs["feed_forward"][(index_NK == int(entry["expert"])).any(1)]
            assert entry["tokens"] == entry["calibrated_on"] == len(own_ND) > 50 and entry["alpha"] > 0
            c_D = dict(input_scales(torch.ones(8, 64), own_ND, "awq"))[entry["alpha"]]
            stored_ED = made.blocks[0].feed_forward.gate_up.input_scale.float()
            torch.testing.assert_close(stored_ED[int(entry["expert"])], c_D, rtol=0.02, atol=0)


@torch.no_grad()
def test_experts_without_tokens_borrow():
    lonely = quantize_model(model(), [torch.tensor([[5]])], "awq")  # one token: two experts of a layer see none
    experts = [entry for entry in lonely.report if (entry["expert"] or "").isdecimal()]
    assert sorted({entry["tokens"] for entry in experts}) == [0, 1]
    assert all(entry["calibrated_on"] == 1 for entry in experts)
    assert lonely(torch.cat(batches(1))).isfinite().all()


@torch.no_grad()
def test_experts_are_lent_tokens_up_to_the_minimum(monkeypatch):
    monkeypatch.setattr(quantize, "MINIMUM", 200)
    experts = [entry for entry in quantize_model(model(), batches(0), "rtn").report if (entry["expert"] or "").isdecimal()]
    assert all(entry["calibrated_on"] == max(entry["tokens"], 200) for entry in experts)
    assert min(entry["tokens"] for entry in experts) < 200 < max(entry["tokens"] for entry in experts)  # of 448


def expert_counts(chosen):
    load = sum(torch.stack([torch.bincount(i.flatten(), minlength=4) for _, i in model().hidden(tokens)[1]]) for tokens in chosen)
    return load.min().item()


@torch.no_grad()
def test_oversample_until_every_expert_has_seen_enough():
    pool = batches(5, n=40, length=16)
    assert oversample(model(), pool, first=3, minimum=0) == [0, 1, 2]
    chosen = oversample(model(), pool, first=3, minimum=60)
    assert chosen[:3] == [0, 1, 2] and len(set(chosen)) == len(chosen) < 40
    assert expert_counts([pool[i] for i in chosen[:-1]]) < 60 <= expert_counts([pool[i] for i in chosen])
    enough = oversample(model(), [*pool[:30], torch.cat(pool, 1), *pool[30:]], first=3, minimum=60)  # one that suffices alone
    assert enough == [0, 1, 2, 30]
    everything = oversample(model(), pool, first=3, minimum=10**6)  # the pool ends first
    assert sorted(everything) == list(range(40))


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_reloaded_answers_the_same(method, tmp_path):
    path, tokens = str(tmp_path / "step_1.pt"), torch.cat(batches(1))
    save_checkpoint(path, quantized(method), step=1, stage="sft2")
    state = load_checkpoint(path)
    assert is_quantized(state) and not is_quantized({"model": model().state_dict()})
    matrix_bytes = sum(t.nbytes for name, t in state["model"].items() if name.rpartition(".")[0] in matrices(model().config))
    weights = sum(E * out * inner for E, out, inner in matrices(model().config).values())
    assert matrix_bytes < weights * (0.7 if method in ("awq", "rtn") else 1.2)  # narrow groups here: scales weigh more than usual
    reloaded, here = load_quantized(state), quantize_model(model(), batches(0), method)
    torch.testing.assert_close(here(tokens), quantized(method)(tokens), rtol=0, atol=0)  # a pure function of its arguments
    pack(here)
    torch.testing.assert_close(reloaded(tokens), here(tokens), rtol=0, atol=0)
    full = model()(tokens)
    assert 1e-4 < (reloaded(tokens) - full).norm() / full.norm() < 0.8
    rounding = 0.05 if method in ("awq", "rtn") else 0.12  # packed products are summed in bf16, and what FP8 rounds next may tip over
    assert (reloaded(tokens) - quantized(method)(tokens)).norm() < rounding * full.norm()


def test_foreign_and_torn_files_are_named(tmp_path):
    path = str(tmp_path / "step_1.pt")
    save_checkpoint(path, quantized("awq"), step=1, stage="sft2")
    state = load_checkpoint(path)

    def spoiled(change):
        tensors = dict(state["model"])
        change(tensors)
        return {**state, "model": tensors}

    name = "blocks.0.attention.qkv"
    for change, message in (
        (lambda t: t.pop(f"{name}.scales"), f"{name} holds input_scale, qweight, zeros"),
        (lambda t: t.update({f"{name}.qweight": t[f"{name}.qweight"][:, :5]}), rf"{name}.qweight has shape \(1, 5, 32\), need \(1, 128"),
        (lambda t: t.update({f"{name}.scales": torch.tensor(1.0)}), rf"{name}.scales has shape \(\), need \(1, 128, 1\)"),
        (lambda t: t.update({f"{name}.scales": torch.zeros(1, 128, 0)}), rf"{name}.scales has shape \(1, 128, 0\), need \(1, 128, 1\)"),
        (lambda t: t.pop("head.weight"), "head.weight is missing or foreign"),
        (lambda t: t.update({"lora.weight": torch.zeros(1)}), "lora.weight is missing or foreign"),
        (lambda t: t.update({"norm.weight": torch.zeros(3)}), r"norm.weight has shape \(3,\), need \(64,\)"),
        (lambda t: t.update({f"{name}.qweight": t[f"{name}.qweight"].char()}), f"{name}.qweight is of torch.int8, need torch.uint8"),
        (lambda t: t.update({f"{name}.zeros": t[f"{name}.zeros"] + 200}), f"{name}.zeros holds what quantize.py never writes"),
        (lambda t: t.update({f"{name}.scales": t[f"{name}.scales"] * torch.nan}), f"{name}.scales holds what quantize.py never writes"),
    ):
        with pytest.raises(ValueError, match=message):
            load_quantized(spoiled(change))
    with pytest.raises(ValueError, match="sft2 is quantized and can only answer"):
        load_model(state)
    with open(path, "r+b") as file:
        file.seek(1000)
        file.write(b"torn")
    with pytest.raises(ValueError, match="step_1.pt is torn or foreign"):
        load_checkpoint(path)
    os.makedirs(tmp_path / "run-awq" / "sft2")
    shutil.copy(path, tmp_path / "run-awq" / "sft2")
    (tmp_path / "run-awq" / "quantization.json").write_text("{}")
    with pytest.raises(ValueError, match="run-awq and make it again with quantize.py"):  # sft.py could not
        load_latest(str(tmp_path / "run-awq"), "sft2")


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="groups of 48 do not divide 64 inputs"):
        quantize_int4(torch.ones(2, 64), 48)
    with pytest.raises(ValueError, match="not finite"):
        quantize_int4(torch.full((2, 64), float("nan")), 32)
    with pytest.raises(ValueError, match="not finite"):
        quantize_fp8(torch.full((2, 64), float("inf")))
    with pytest.raises(ValueError, match="'gptq' is not one of awq"):
        quantize_model(model(), batches(0), "gptq")
    for group in (0, 16, 96):
        with pytest.raises(ValueError, match=f"groups of {group} inputs: must be a power of two and at least 32"):
            quantize_model(model(), batches(0), "awq", group=group)
    with pytest.raises(ValueError, match="no calibration batches"):
        quantize_model(model(), [])
    broken = copy.deepcopy(model())
    with torch.no_grad():
        broken.embedding.weight[7] = torch.nan
    for method in METHODS:
        with pytest.raises(ValueError, match="layer 0 gives states that are not finite"):
            quantize_model(broken, [torch.tensor([[1, 7]])], method)
    with pytest.raises(ValueError, match="calibration batch 1: need .* 0..511"):
        quantize_model(model(), [torch.tensor([[1]]), torch.tensor([[512]])])


def test_a_folder_is_drawn_from_as_a_whole(micro_tokenizer, tmp_path):
    for lang in ("de", "th"):
        (tmp_path / f"{lang}.jsonl").write_text("".join(json.dumps({"text": f"{lang} {i}"}) + "\n" for i in range(300)))
    pool = calibration_pool(micro_tokenizer, str(tmp_path), 64, 0, n=40)
    langs = [micro_tokenizer.decode(batch[0].tolist())[:2] for batch in pool]
    assert len(langs) == 40 and 8 < langs.count("th") < 32


def test_command_line(micro_tokenizer, tmp_path, script, monkeypatch, capsys):
    """A bf16 run is quantized into a run folder of its own, which generate.py answers from."""
    run = str(tmp_path / "run")
    micro_tokenizer.save(run)
    halved = Compass(model().config).to(torch.bfloat16)
    save_checkpoint(f"{run}/sft2/step_9.pt", halved, step=9, stage="sft2", base="sft1 01234567", tokenizer_hash=micro_tokenizer.hash)

    def command(*flags):
        monkeypatch.setattr(sys, "argv", ["quantize.py", "--device", "cpu", *flags])
        quantize.main()

    command("--run", run, "--method", "awq")
    printed = capsys.readouterr().out
    assert f"{run}-awq/sft2/step_9.pt" in printed and all(f"expert {e}" in printed for e in range(4))
    state = load_checkpoint(f"{run}-awq/sft2/step_9.pt")
    assert state["base"] == "sft1 01234567"  # tells evaluate.py whether thoughts were taught
    assert state["model"]["head.weight"].dtype == torch.bfloat16 and torch.equal(state["model"]["head.weight"], halved.head.weight)
    with open(f"{run}-awq/quantization.json") as file:
        summary = json.load(file)
    assert summary["method"] == "awq" and min(entry["tokens"] for entry in summary["matrices"]) >= summary["minimum"]
    with pytest.raises(ValueError, match="already holds a checkpoint"):
        command("--run", run)
    os.renames(f"{run}/sft2", f"{run}/dpo/1")  # a round: what is made of it is a stage that can be found
    command("--run", run, "--method", "rtn", "--stage", "dpo/1", "--out", str(tmp_path / "of a round"))
    assert latest_stage(str(tmp_path / "of a round")) == "dpo"
    os.renames(f"{run}/dpo/1", f"{run}/sft2")
    other = str(tmp_path / "other")
    save_checkpoint(f"{other}/long/step_1.pt", halved)
    with pytest.raises(ValueError, match="other already holds a checkpoint of long"):  # whose tokenizer would be lost
        command("--run", run, "--out", other)
    assert os.listdir(other) == ["long"]
    for held, name in (("reward/step_1.pt", "a checkpoint of reward"), ("tokenizer.tiktoken", "tokenizer.tiktoken")):
        shutil.rmtree(other)
        write_atomically(os.path.join(other, held), b"")
        with pytest.raises(ValueError, match=f"other already holds {name}"):
            command("--run", run, "--out", other)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "en.jsonl").write_text(json.dumps({"text": "a"}))
    with pytest.raises(ValueError, match="texts: no text of two tokens or more to calibrate on"):
        command("--run", run, "--out", str(tmp_path / "none"), "--data", str(tmp_path / "texts"))
    with pytest.raises(ValueError, match="is quantized and can only answer"):
        command("--run", f"{run}-awq")
    answer = script("generate.py", "--run", f"{run}-awq", "--prompt", "Hello", "--device", "cpu")
    assert answer.returncode == 0, answer.stderr
    for method in ("rtn", "fp8", "fp8-naive"):
        command("--run", run, "--method", method)
        loaded, tokenizer = load_for_inference(f"{run}-{method}", "cpu")
        assert len(generate(loaded, tokenizer, ["Hello"], GREEDY)[0].ids) > 0
    with open(f"{run}-fp8/sft2/step_9.pt", "r+b") as file:
        file.write(b"torn")
    answer = script("generate.py", "--run", f"{run}-fp8", "--prompt", "Hello", "--device", "cpu")
    assert answer.returncode == 2 and "make it again with quantize.py" in answer.stderr


@pytest.mark.parametrize("method", ("awq", "fp8"))
def test_packed_layers_with_and_without_fast_bf16(method, monkeypatch):
    """1 row, few and many: a CPU without bf16 instructions multiplies in fp32, to the same numbers but for rounding."""
    layer, results = copy.deepcopy(quantized(method).blocks[0].attention.qkv), []
    layer.pack()
    exact = quantized(method).blocks[0].attention.qkv
    for fast in (True, False):
        monkeypatch.setattr(lowbit, "FAST_BF16", fast)
        for rows in (1, 5, 100):
            x_ND = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows))
            results.append((layer(x_ND) - exact(x_ND)).norm() / exact(x_ND).norm())
    assert max(results) < 0.02 and results[0] == results[3] and results[5] < results[2]


def test_int4_matmul_of_one_matrix():
    g = torch.Generator().manual_seed(6)
    x, weight = torch.randn(2, 5, 64, generator=g), torch.randn(24, 64, generator=g)
    stored = quantize_int4(weight, 32)
    torch.testing.assert_close(int4_matmul(x, *stored), F.linear(x, dequantize_int4(*stored)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(int4_matmul_reference(x, *stored), int4_matmul(x, *stored), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fp8_matmul_reference(x, *quantize_fp8(weight)), fp8_matmul(x, *quantize_fp8(weight)), rtol=1e-5, atol=1e-5)
