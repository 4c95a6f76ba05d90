"""On a GPU: the Triton kernels as compiled, the model and its training beside the CPU's, every script. Skipped where there is none."""

import dataclasses
import json
import os
import shutil

import pytest
import torch

from checkpoint import latest_stage, load_latest, load_model
from compass import CONFIGS, Compass
from data.tasks import tasks
from evaluate import accuracy, answer_tasks
from generate import GREEDY, Sampling, generate, load_for_inference
from kernels import permute, unpermute
from lowbit import load_quantized
from quantize import calibration_pool, quantize_model
from tests.conftest import ROOT
from tests.test_kernels import check, check_gemms, check_rows, routing
from tokenizer import Tokenizer
from train import Schedule, assemble, fit, language_model_loss, precision

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SHIPPED = os.path.join(ROOT, "checkpoints", "tiny")


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
def test_permute_and_unpermute(dtype, tolerance):
    check(dtype, tolerance, "cuda")


# A Hopper's fp8 instruction sums in fewer bits than fp32 between the kernel's own additions.
@pytest.mark.parametrize("dtype,int4,fp8", [(torch.float32, 1e-5, 1e-3), (torch.bfloat16, 2e-2, 2e-2), (torch.float16, 5e-3, 5e-3)])
def test_quantised_products_equal_float64(dtype, int4, fp8):
    check_gemms(dtype, int4, fp8, "cuda")


def test_rows_are_quantised_as_the_eager_twin_does():
    check_rows("cuda")


def test_kernels_are_deterministic():
    """Twice the same input, forward and backward: no atomics, so the same bits."""
    N, D, E, K = 4096, 768, 48, 4
    g = torch.Generator().manual_seed(0)
    x, w, grad = (torch.randn(N, n, generator=g).cuda() for n in (D, K, D))
    index, results = routing(N, E, K).cuda(), []
    for _ in range(2):
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        x_sorted, row_of, _ = permute(x, index, E)
        y = unpermute(x_sorted.sin(), row_of, w)
        y.backward(grad)
        results.append((x_sorted, y, x.grad, w.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


CONFIG = dataclasses.replace(
    CONFIGS["tiny"], n_layers=2, dim=64, n_heads=4, n_kv_heads=2, head_dim=32, n_experts=8, top_k=2, expert_dim=32, vocab_size=512
)
DOCUMENTS = [[30, 40, 8], [70, 29], [100]]  # lengths of the packed documents of each row


def batch(seed=0, width=128):
    g = torch.Generator().manual_seed(seed)
    return assemble([[(torch.randint(512, (n,), generator=g).numpy(), [1] * n) for n in row] for row in DOCUMENTS], width)


def on(device, batch):
    return {name: tensor.to(device) for name, tensor in batch.items()}


def loss_and_gradients(model, device, width, context):
    model = model.to(device)
    model.zero_grad(set_to_none=True)
    with context:
        loss, _ = language_model_loss(model, on(device, batch(width=width)))
    loss.backward()
    return loss.item(), {name: p.grad.cpu().clone() for name, p in model.named_parameters()}  # .to moves gradients in place


@pytest.mark.parametrize("width,mtp_depth", [(128, 0), (128, 1), (100, 0), (150, 0)])
def test_loss_and_gradients_of_packed_documents_equal_the_cpus(width, mtp_depth):
    """flex_attention (also where its blocks of 128 do not divide the rows), Triton permute, grouped matmul; fp32, then as in training."""
    torch.manual_seed(0)
    model, plain = Compass(dataclasses.replace(CONFIG, mtp_depth=mtp_depth)), torch.autocast("cuda", enabled=False)
    exact, exact_grads = loss_and_gradients(model, "cpu", width, plain)
    for context, tolerance in ((plain, 1e-4), (precision(model, torch.device("cuda")), 0.2)):  # bf16 flips an expert near a tie
        loss, grads = loss_and_gradients(model, "cuda", width, context)
        errors = {name: ((grad - exact_grads[name]).norm() / exact_grads[name].norm()).item() for name, grad in grads.items()}
        assert loss == pytest.approx(exact, rel=tolerance / 10) and all(error < tolerance for error in errors.values()), errors


def train(run, steps, resume=False, stop=None):
    torch.manual_seed(0)
    model = Compass(CONFIG).cuda()

    def batches(step):
        if step == stop:
            raise InterruptedError
        return [batch(step % 4)]

    try:
        fit(model, batches, language_model_loss, Schedule(steps, 3e-3, 3e-4), run=str(run), stage="general", save_every=10, resume=resume)
    except InterruptedError:
        pass
    with open(run / "metrics.jsonl", encoding="utf-8") as file:
        return model, [json.loads(line)["loss"] for line in file]


def test_training_learns_and_resumes_bit_for_bit(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    straight, curve = train(tmp_path / "a", 60)
    train(tmp_path / "b", 60, stop=25)
    resumed, again = train(tmp_path / "b", 60, resume=True)
    assert curve[-1] < curve[0] / 2 and again == curve
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_the_router_stays_in_fp32_and_no_block_waits_for_the_gpu():
    """Under bf16 autocast the logits are fp32; inside the blocks nothing asks the GPU for a number."""
    model = Compass(CONFIG).cuda()
    data = on("cuda", batch())
    with precision(model, torch.device("cuda")):
        _, routing, rope, mask = model.hidden(data["tokens"], doc_ids_BT=data["doc_ids"], positions_BT=data["positions"])
        assert routing[0][0].dtype == torch.float32
        x_BTD = model.embedding(data["tokens"]).detach()
        torch.cuda.set_sync_debug_mode("error")
        try:
            y_BTD, _ = model.blocks[0](x_BTD, rope, mask)
            y_BTD.float().square().mean().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


PROMPTS = ["Dịch sang tiếng Anh: tai nghe", "What is 27 + 45?", "Tuliskan harga dari: sepatu, Rp 120.000", "แปลเป็นภาษาอังกฤษ: รองเท้า"]


def shipped():
    return load_latest(SHIPPED, latest_stage(SHIPPED)), Tokenizer.load(SHIPPED)


def test_greedy_answers_in_fp32_are_the_cpus():
    state, tokenizer = shipped()
    prompts = [tokenizer.encode_chat([{"role": "user", "content": text}])[0] for text in PROMPTS]
    sampling = dataclasses.replace(GREEDY, max_tokens=40)
    theirs, ours = (generate(load_model(state, device).eval(), tokenizer, prompts, sampling) for device in ("cpu", "cuda"))
    assert [c.ids for c in ours] == [c.ids for c in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-3)


def test_a_request_is_independent_of_its_batch_in_fp32():
    state, tokenizer = shipped()
    model = load_model(state, "cuda").eval()
    prompts = [tokenizer.encode_chat([{"role": "user", "content": text}])[0] for text in PROMPTS]
    together = generate(model, tokenizer, prompts, Sampling(max_tokens=24), n=3)
    alone = [c for prompt in prompts for c in generate(model, tokenizer, [prompt], Sampling(max_tokens=24), n=3)]
    assert [c.ids for c in together] == [c.ids for c in alone]


def test_bf16_answers_as_well_as_the_cpu():
    """load_for_inference stores bf16 on a GPU: over the 368 tasks of two a cell the accuracy is within five points."""
    test, shares = tasks("test", 0, 2), []
    for device in ("cpu", "cuda"):
        model, tokenizer = load_for_inference(SHIPPED, device)
        shares.append(accuracy(test, [answer for _, answer in answer_tasks(model, tokenizer, test, thinking=True)])["overall"])
    assert shares[1] == pytest.approx(shares[0], abs=0.05), shares


@pytest.mark.parametrize("method", ["awq", "fp8"])
def test_quantized_logits_equal_the_eager_twins(method):
    """The same quantized tensors: Triton kernels on the GPU, eager twins on the CPU. In fp8 a sum that differs in its last bits makes
    the next activation round otherwise: there both must be as far from the unquantized model, in int4 equal."""
    state, tokenizer = shipped()
    model = load_model(state).eval()
    pool = calibration_pool(tokenizer, None, model.config.max_seq_len, 0, n=8)
    quantized = quantize_model(model, pool, method)  # not packed: a CPU takes the eager twins
    ids = torch.tensor([tokenizer.encode_chat([{"role": "user", "content": PROMPTS[0]}])[0]])
    with torch.inference_mode():
        full, theirs = model(ids), quantized(ids)
        state = {"config": dataclasses.asdict(quantized.config), "model": quantized.state_dict()}
        ours = load_quantized(state, "cuda")(ids.cuda()).cpu()
    if method == "awq":
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert 0.7 < (ours - full).norm() / (theirs - full).norm() < 1.3 and torch.equal(ours.argmax(-1)[0, -1], theirs.argmax(-1)[0, -1])


def test_every_script_runs(script, tmp_path):
    """Every stage a few steps, quantization and evaluation."""
    run, new = tmp_path / "run", tmp_path / "new"
    shutil.copytree(SHIPPED, run)
    Tokenizer.load(SHIPPED).save(new)
    for command in (
        ("train.py", "--run", new, "--steps", "12"),
        ("sft.py", "--run", new, "--steps", "6"),
        ("reward.py", "--run", run, "--steps", "6"),
        ("otpo.py", "--run", run, "--steps", "4"),
        ("dpo.py", "--run", run, "--rounds", "1", "--steps", "2"),
        ("quantize.py", "--run", run, "--stage", "sft2", "--out", tmp_path / "awq"),
        ("quantize.py", "--run", run, "--stage", "sft2", "--method", "fp8", "--out", tmp_path / "fp8"),
        ("evaluate.py", "--run", tmp_path / "awq", "--tasks", "1"),
        ("evaluate.py", "--run", tmp_path / "fp8", "--tasks", "1"),
    ):
        result = script(*command)
        assert result.returncode == 0, (command, result.stdout[-2000:], result.stderr[-4000:])


def test_torchrun_over_nccl(script, tmp_path):
    """One process of many: FSDP2 and sharded checkpoints on nccl, then on from them without torchrun. (ep > 1 needs more GPUs.)"""
    Tokenizer.load(SHIPPED).save(tmp_path)
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "1", "--")
    for command in (
        (*torchrun, "train.py", "--run", tmp_path, "--stage", "general", "--steps", "6", "--parallel", "ep=1"),
        ("train.py", "--run", tmp_path, "--stage", "anneal", "--steps", "2"),
    ):
        result = script(*command)
        assert result.returncode == 0, (command, result.stdout[-2000:], result.stderr[-4000:])
