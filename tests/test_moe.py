"""moe.py against a per-token loop in float64, Qwen2-MoE's block on copied weights, and losses worked out by hand."""

import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen2MoeConfig
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import moe
from compass import init_weights
from moe import Linear, MoE, load_balancing_loss, router_z_loss


def naive_moe(layer, x_ND):
    """One token, one expert at a time."""
    rows = []
    for x_D in x_ND:
        probs_E = (layer.router.weight @ x_D).softmax(0)
        chosen = probs_E.topk(layer.top_k)
        weights = chosen.values / chosen.values.sum() if layer.top_k > 1 else chosen.values
        y_D = torch.zeros_like(x_D)
        for weight, e in zip(weights, chosen.indices.tolist(), strict=True):
            gate, up = (x_D @ layer.gate_up_ED2F[e]).chunk(2)
            y_D = y_D + weight * ((F.silu(gate) * up) @ layer.down_EFD[e])
        gate, up = (layer.shared.gate_up.weight @ x_D).chunk(2)
        rows.append(y_D + layer.shared.down.weight @ (F.silu(gate) * up))
    return torch.stack(rows)


def make_layer(config, n_experts=4, top_k=2):
    torch.manual_seed(1)
    config.n_experts, config.top_k = n_experts, top_k
    layer = MoE(config)
    init_weights(layer, config)
    return layer


@pytest.mark.parametrize("tokens,n_experts,top_k", [(1, 4, 2), (17, 4, 2), (9, 3, 3), (12, 4, 1), (40, 16, 4)])
def test_equals_the_loop_forward_and_gradients(micro_config, tokens, n_experts, top_k):
    layer = make_layer(micro_config, n_experts, top_k)
    twin = make_layer(micro_config, n_experts, top_k).double()
    x = torch.randn(1, tokens, 32, requires_grad=True)
    x64 = x.detach().double()[0].requires_grad_()
    y, logits, index = layer(x)
    reference = naive_moe(twin, x64)
    torch.testing.assert_close(y[0].double(), reference, rtol=1e-5, atol=1e-5)
    g = torch.randn_like(y)
    y.backward(g)
    reference.backward(g[0].double())
    torch.testing.assert_close(x.grad[0].double(), x64.grad, rtol=1e-4, atol=1e-5)
    for (name, p), q in zip(layer.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-4, atol=1e-5, msg=name)
    assert index.shape == (tokens, top_k) and logits.shape == (tokens, n_experts) and logits.dtype == torch.float32


def test_all_tokens_on_one_expert_leaves_the_others_empty(micro_config):
    layer = make_layer(micro_config, 4, 1)
    with torch.no_grad():
        layer.router.weight.zero_()  # ties: topk takes the same expert for all
    x = torch.randn(2, 5, 32, requires_grad=True)
    y, _, index = layer(x)
    assert index.unique().numel() == 1
    y.sum().backward()
    empty = [e for e in range(4) if e != index[0, 0]]
    assert layer.gate_up_ED2F.grad[empty].abs().max() == 0 and layer.gate_up_ED2F.grad.isfinite().all()


def test_equals_qwen2_moe_block(micro_config):
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    layer = make_layer(micro_config)
    theirs = Qwen2MoeSparseMoeBlock(
        Qwen2MoeConfig(
            hidden_size=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True,
            shared_expert_intermediate_size=2 * 16,
        )
    )  # fmt: skip
    with torch.no_grad():
        theirs.gate.weight.copy_(layer.router.weight)
        theirs.experts.gate_up_proj.copy_(layer.gate_up_ED2F.transpose(1, 2))
        theirs.experts.down_proj.copy_(layer.down_EFD.transpose(1, 2))
        gate, up = layer.shared.gate_up.weight.chunk(2)
        theirs.shared_expert.gate_proj.weight.copy_(gate)
        theirs.shared_expert.up_proj.weight.copy_(up)
        theirs.shared_expert.down_proj.weight.copy_(layer.shared.down.weight)
        theirs.shared_expert_gate.weight.zero_()  # theirs gates the shared expert by sigmoid(0) = 1/2
    x = torch.randn(2, 7, 32)
    out = theirs(x)
    out = out[0] if isinstance(out, tuple) else out
    ours = layer(x)[0] - 0.5 * layer.shared(x)
    torch.testing.assert_close(ours, out, rtol=1e-5, atol=1e-5)


def test_aux_loss_by_hand():
    # two tokens, two experts, top-1: p = (0.9 + 0.6, 0.1 + 0.4) / 2 = (0.75, 0.25), both take expert 0: 2 * 0.75 * 1
    probs, index = torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([[0], [0]])
    assert load_balancing_loss(probs, index, 2).item() == pytest.approx(1.5)
    even = torch.full((8, 4), 0.25)
    assert load_balancing_loss(even, torch.arange(8).view(8, 1) % 4, 4).item() == pytest.approx(1.0)
    certain = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).expand(6, 4)
    assert load_balancing_loss(certain, torch.tensor([[0, 1]]).expand(6, 2), 4).item() == pytest.approx(2.0)  # E / K


def test_aux_loss_is_transformers_over_k():
    logits = torch.randn(50, 8)
    index = logits.topk(3).indices
    theirs = load_balancing_loss_func((logits,), num_experts=8, top_k=3)
    assert load_balancing_loss(logits.softmax(-1), index, 8).item() * 3 == pytest.approx(theirs.item(), rel=1e-5)


def test_gradients_of_the_router_losses():
    """aux through the probabilities alone, as in transformers; z is d mean(lse²) = 2 lse softmax / N."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 8, generator=g)
    ours, theirs, z = (logits.clone().requires_grad_() for _ in range(3))
    index = logits.topk(3).indices
    (3 * load_balancing_loss(ours.softmax(-1), index, 8)).backward()
    load_balancing_loss_func((theirs,), 8, 3).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    router_z_loss(z).backward()
    torch.testing.assert_close(z.grad, 2 * logits.logsumexp(-1, keepdim=True) * logits.softmax(-1) / len(logits))


def test_z_loss_by_hand():
    # logsumexp of (log 1, log 3) is log 4; of (0, 0) it is log 2
    logits = torch.tensor([[1.0, 3.0], [1.0, 1.0]]).log()
    assert router_z_loss(logits).item() == pytest.approx((1.3862944**2 + 0.6931472**2) / 2, rel=1e-5)


def test_router_stays_in_fp32_under_autocast(micro_config):
    layer = make_layer(micro_config)
    x = torch.randn(1, 64, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, logits, index = layer(x)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, x[0] @ layer.router.weight.T, rtol=1e-5, atol=1e-5)


def test_asking_every_expert_equals_sorting(micro_config, monkeypatch):
    """The path of small batches without gradient, and when it is taken."""
    layer = make_layer(micro_config)
    for tokens in (1, 2, 5, 32, 33):
        x = torch.randn(1, tokens, 32)
        expected = layer(x)[0].detach()
        with torch.no_grad():
            torch.testing.assert_close(layer(x)[0], expected, rtol=1e-5, atol=1e-6)
            logits_NE, weights_NK, index_NK = layer.route(x[0])
            routed = layer.every_expert(x[0], weights_NK, index_NK) + layer.shared(x[0])
            torch.testing.assert_close(routed, expected[0], rtol=1e-5, atol=1e-6)
            assert layer.all_are_read(tokens) == (tokens <= 32)
            monkeypatch.setattr(moe, "SMALL", 0)
            assert layer.all_are_read(tokens) == (2 <= tokens <= 32)
            monkeypatch.undo()
        assert not layer.all_are_read(tokens)  # never in training


@pytest.mark.parametrize("threads", [1, 2, 3])
@torch.no_grad()
def test_products_divided_among_threads(threads, micro_config, monkeypatch):
    """Few rows on a CPU: the parts of a product give the whole, and a token alone what it gets among others."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(moe, "SMALL", 0)
    linear = Linear(24, 40)  # 3 does not divide 40
    divided, alone, bmm, one_token = [], [], torch.bmm, MoE.one_token
    monkeypatch.setattr(torch, "bmm", lambda a, b: divided.append(len(a)) or bmm(a, b))
    monkeypatch.setattr(MoE, "one_token", lambda *given: alone.append(1) or one_token(*given))
    linear(torch.randn(5, 24)), linear(torch.randn(33, 24))
    assert divided == [threads] * (threads == 2)
    for shape in ((24,), (1, 24), (5, 24), (2, 16, 24), (33, 24), (0, 24)):
        x = torch.randn(shape)
        torch.testing.assert_close(linear(x), x @ linear.weight.T)
        assert linear(x).is_contiguous()
    layer = make_layer(micro_config)
    x_BTD = torch.randn(1, 40, 32)
    together = layer(x_BTD)[0]
    for t in range(40):
        torch.testing.assert_close(layer(x_BTD[:, t : t + 1])[0], together[:, t : t + 1], rtol=1e-5, atol=1e-6)
    assert len(alone) == 40


def test_bf16_weights_answer_in_both_ways(micro_config):
    layer = make_layer(micro_config)
    for name, p in layer.named_parameters():
        p.data = p.data if name == "router.weight" else p.data.bfloat16()
    x = torch.randn(1, 5, 32).bfloat16()
    with torch.no_grad():
        every, sorted_ = layer(x)[0], layer(torch.cat([x, x.repeat(1, 7, 1)], 1))[0][:, :5]  # 5 and 40 tokens
    assert every.dtype == torch.bfloat16
    torch.testing.assert_close(every, sorted_, rtol=0.02, atol=0.02)


def test_losses_without_tokens_are_zero():
    """A rank of many may hold padding only."""
    empty = torch.zeros(0, 4)
    aux = load_balancing_loss(empty, torch.zeros(0, 2, dtype=torch.int64), 4, torch.tensor([3, 3, 2, 2]))
    assert aux.item() == 0 and router_z_loss(empty).item() == 0
