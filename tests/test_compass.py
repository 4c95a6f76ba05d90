"""compass.py against transformers on copied weights, full logits, separate documents, and the published totals."""

import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from compass import (
    CONFIGS,
    Compass,
    apply_rope,
    chunked_cross_entropy,
    count_parameters,
    document_mask,
    init_parameter,
    rope_table,
)  # fmt: skip
from kvcache import KVCache
from train import assemble


def test_without_gradients_the_head_is_multiplied_once(micro_model):
    tokens = torch.randint(0, 512, (2, 19))
    counts = []
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled), FlopCounterMode(display=False) as counter:
            micro_model.loss(tokens, tokens)
        counts.append(counter.get_total_flops())
    assert counts[0] - counts[1] == 2 * (2 * 19) * 32 * 512  # d hidden; the other product, d head, is in place and torch does not count it


def test_logits_and_gradients_equal_transformers(pair):
    ours, theirs = pair
    tokens = torch.randint(0, 512, (2, 19))
    logits = ours(tokens)
    reference = theirs(tokens).logits
    torch.testing.assert_close(logits, reference, rtol=1e-5, atol=1e-5)
    targets = torch.randint(0, 512, (2, 19))
    ours.loss(tokens, targets).lm.backward()
    F.cross_entropy(reference.flatten(0, 1), targets.flatten()).backward()
    for mine, other in (
        (ours.embedding.weight, theirs.model.embed_tokens.weight),
        (ours.head.weight, theirs.lm_head.weight),
        (ours.blocks[0].attention.out.weight, theirs.model.layers[0].self_attn.o_proj.weight),
        (ours.blocks[0].feed_forward.router.weight, theirs.model.layers[0].mlp.gate.weight),
        (ours.blocks[1].feed_forward.down_EFD, theirs.model.layers[1].mlp.experts.down_proj),
    ):
        theirs_grad = other.grad.transpose(1, 2) if other.dim() == 3 else other.grad
        torch.testing.assert_close(mine.grad, theirs_grad, rtol=1e-4, atol=1e-5)


def test_chunked_loss_equals_full_logits():
    h = torch.randn(50, 16, requires_grad=True)
    head = torch.randn(99, 16, requires_grad=True)
    target, weight = torch.randint(0, 99, (50,)), torch.rand(50) * (torch.rand(50) > 0.4)
    grads = []
    for rows in (7, None):
        h.grad = head.grad = None
        if rows:
            loss, nll = chunked_cross_entropy(h, head, target, weight, rows)
            torch.testing.assert_close(nll, F.cross_entropy(h @ head.T, target, reduction="none") * (weight > 0))
            assert not nll.requires_grad
        else:
            loss = (F.cross_entropy(h @ head.T, target, reduction="none") * weight).sum() / weight.sum()
        (2 * loss).backward()
        grads.append((loss.detach(), h.grad, head.grad))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_chunked_loss_under_autocast():
    """Products in bf16 as on a GPU; the gradients of all chunks are summed in fp32."""
    g = torch.Generator().manual_seed(0)
    h, head = (torch.randn(n, 16, generator=g).requires_grad_() for n in (50, 99))
    target = torch.randint(0, 99, (50,), generator=g)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = chunked_cross_entropy(h, head, target, torch.ones(50), 7)
    reference = F.cross_entropy(h @ head.T, target)
    for ours, theirs in zip(torch.autograd.grad(loss, (h, head)), torch.autograd.grad(reference, (h, head)), strict=True):
        assert ours.dtype == torch.float32 and (ours - theirs).norm() < 0.02 * theirs.norm()


def test_small_losses_survive_large_logits():
    h = torch.tensor([[1.0, 0.0]]) * 1e4
    head = torch.tensor([[1.0, 0.0], [1.0 - 1e-3, 0.0]])
    nll = chunked_cross_entropy(h, head, torch.tensor([0]), torch.ones(1))[1]
    torch.testing.assert_close(nll, F.cross_entropy(h @ head.T, torch.tensor([0]), reduction="none"), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "name,shape,std",
    [
        ("blocks.0.attention.qkv.weight", (64, 256), 256**-0.5), ("blocks.0.attention.out.weight", (64, 256), (256 * 8) ** -0.5),
        ("x.shared.down.weight", (64, 256), (256 * 8) ** -0.5), ("x.down_EFD", (4, 64, 128), (64 * 8) ** -0.5),
        ("x.gate_up_ED2F", (4, 128, 64), 128**-0.5), ("embedding.weight", (500, 64), 64**-0.5),
    ],
)  # fmt: skip
def test_first_weights_of_four_layers(name, shape, std):
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIGS["tiny"], n_layers=4, dim=256, n_heads=4, n_kv_heads=2, head_dim=8)
    assert init_parameter(name, torch.empty(shape), config).std().item() == pytest.approx(std, rel=0.03)


def test_queries_begin_near_their_keys_and_the_head_as_the_embedding_turned():
    torch.manual_seed(0)
    model = Compass(CONFIGS["tiny"])
    q_GHCD, k_GHCD, _ = (x.unflatten(0, (4, -1)) for x in model.blocks[1].attention.qkv.weight.view(16, 32, 128).split((8, 4, 4)))
    assert F.cosine_similarity(q_GHCD, k_GHCD, -1).mean().item() == pytest.approx(0.5, abs=0.02)  # 4 groups of 2 heads
    assert F.cosine_similarity(q_GHCD, k_GHCD.roll(1, 0), -1).mean().item() == pytest.approx(0, abs=0.02)
    embedding, head = model.embedding.weight, model.head.weight
    assert torch.equal(head, torch.cat((embedding[:, 64:], embedding[:, :64]), 1)) and head.data_ptr() != embedding.data_ptr()


def packed_and_alone(model):
    """One packed row of three documents, and the same documents each in a row of its own."""
    g = torch.Generator().manual_seed(3)
    documents = [torch.randint(0, 500, (n,), generator=g).tolist() for n in (9, 20, 14)]
    packed = assemble([[(ids, [1] * len(ids)) for ids in documents]], 48)
    alone = [assemble([[(ids, [1] * len(ids))]], len(ids)) for ids in documents]
    return documents, packed, alone


def batch_loss(model, batch):
    return model.loss(
        batch["tokens"], batch["targets"], batch["weights"], doc_ids_BT=batch["doc_ids"], positions_BT=batch["positions"]
    )


def test_packed_equals_unpacked(micro_model):
    documents, packed, alone = packed_and_alone(micro_model)
    loss = batch_loss(micro_model, packed).lm
    loss.backward()
    grads = [p.grad.clone() for p in micro_model.parameters()]
    micro_model.zero_grad()
    count = sum(len(ids) - 1 for ids in documents)
    separate = sum(batch_loss(micro_model, batch).lm * (len(ids) - 1) / count for ids, batch in zip(documents, alone, strict=True))
    separate.backward()
    torch.testing.assert_close(loss, separate, rtol=1e-5, atol=1e-5)
    for grad, p in zip(grads, micro_model.parameters(), strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-4, atol=1e-5)


def test_a_document_sees_no_other(micro_model):
    _, packed, _ = packed_and_alone(micro_model)
    inputs = dict(doc_ids_BT=packed["doc_ids"], positions_BT=packed["positions"])
    before = micro_model(packed["tokens"], **inputs)
    changed = packed["tokens"].clone()
    changed[0, 9:29] = 7  # the second document
    after = micro_model(changed, **inputs)
    assert torch.equal(before[0, :9], after[0, :9]) and torch.allclose(before[0, 29:43], after[0, 29:43], atol=1e-6)
    assert not torch.allclose(before[0, 9:29], after[0, 9:29])


def test_padding_stays_outside_all_losses(micro_model):
    _, packed, _ = packed_and_alone(micro_model)
    losses = batch_loss(micro_model, packed)
    noisy = {**packed, "tokens": packed["tokens"].clone()}
    noisy["tokens"][0, 43:] = 99
    for a, b in zip(losses, batch_loss(micro_model, noisy), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(losses.load_LE.sum(1), torch.ones(2))
    nothing = batch_loss(micro_model, {**packed, "doc_ids": torch.full_like(packed["doc_ids"], -1)})
    assert nothing.total.item() == 0 and not nothing.load_LE.any()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("n_layers", 0, "is 0, must be a whole number above 0"), ("n_layers", 2.5, "is 2.5, must be a whole number above 0"),
        ("max_seq_len", True, "is True, must be a whole number above 0"), ("n_shared", -1, "is -1, must be a whole number of at least 0"),
        ("norm_eps", float("nan"), "is nan, must be a number above 0"), ("rope_base", float("inf"), "is inf, must be a number above 0"),
        ("z_weight", -0.1, "is -0.1, must be a number of at least 0"),
        ("dim", 0, "is 0, must be a whole number above 0"), ("vocab_size", "x", "is 'x', must be a whole number above 0"),
        ("n_kv_heads", 3, "is 3, must divide n_heads 4"), ("head_dim", 7, "is 7, must be even"),
        ("top_k", 99, "is 99, more than n_experts 4"),
    ],
)  # fmt: skip
def test_a_bad_config_is_named(micro_config, field, value, message):
    with pytest.raises(ValueError, match=f"config field {field} {re.escape(message)}"):
        dataclasses.replace(micro_config, **{field: value})


@pytest.mark.parametrize("field", ["dim", "expert_dim"])
def test_widths_that_bf16_cannot_group_are_named(micro_config, field):
    with pytest.raises(ValueError, match=f"config field {field} is 36, must be a multiple of 8"):
        Compass(dataclasses.replace(micro_config, **{field: 36}))


def test_documents_in_a_cache_are_refused(micro_model):
    tokens = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match="each row of a cache is one document"):
        micro_model(tokens, doc_ids_BT=torch.zeros_like(tokens), cache=KVCache(micro_model.config, 1, 3, "cpu"))


def test_total_is_the_weighted_sum(micro_model):
    micro_model.router_scale = 0.25
    tokens = torch.randint(0, 500, (2, 12))
    losses = micro_model.loss(tokens, tokens)
    expected = losses.lm + 0.25 * (0.01 * losses.aux + 0.001 * losses.z)
    torch.testing.assert_close(losses.total, expected)


def test_rope_scores_depend_on_distance_only():
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 16, generator=g) for _ in range(2))
    for base in (10_000.0, 1_000_000.0):
        scores = []
        for shift in (0, 5, 900):
            at = [rope_table(torch.tensor([[p + shift]]), 16, base) for p in (7, 3)]
            scores.append((apply_rope(q, *at[0]) * apply_rope(k, *at[1])).sum())
        torch.testing.assert_close(torch.stack(scores), scores[0].expand(3), rtol=1e-4, atol=1e-4)


def test_by_document_and_flex_equal_a_dense_mask(micro_model, monkeypatch):
    from torch.nn.attention.flex_attention import create_block_mask

    _, packed, _ = packed_and_alone(micro_model)
    packed = {name: tensor.repeat(2, 1) for name, tensor in packed.items()}
    doc_ids = packed["doc_ids"]
    assert document_mask(doc_ids) == [9, 20, 14, 5] * 2
    assert document_mask(torch.tensor([[0, 5], [2, 7]])) == [1, 1, 1, 1]  # ids may be larger than rows are long
    by_document = micro_model(packed["tokens"], doc_ids_BT=doc_ids, positions_BT=packed["positions"])
    block = create_block_mask(lambda b, h, q, k: (q >= k) & (doc_ids[b, q] == doc_ids[b, k]), 2, None, 48, 48, "cpu")
    dense = (doc_ids.unsqueeze(2) == doc_ids.unsqueeze(1)).tril().unsqueeze(1)
    for mask in (block, dense):
        monkeypatch.setattr("compass.document_mask", lambda _, mask=mask: mask)
        with torch.no_grad():
            other = micro_model(packed["tokens"], doc_ids_BT=doc_ids, positions_BT=packed["positions"])
        torch.testing.assert_close(other, by_document, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("depth", (1, 2))
def test_mtp_of_packed_documents_by_hand(micro_config, depth):
    """Depth k starts from depth k - 1, sees token t+k and predicts t+k+1, never across the end of a document; the mean over depths.
    A depth's sum is divided by the targets of the language model's loss, as DeepSeek-V3's eq. 24 divides it by T."""
    torch.manual_seed(0)
    model = Compass(dataclasses.replace(micro_config, mtp_depth=depth))
    documents, packed, _ = packed_and_alone(model)
    nll = [[] for _ in range(depth)]
    for ids in documents:
        tokens_1T = torch.tensor([ids])
        h_1TD, _, rope, _ = model.hidden(tokens_1T)
        for k in range(1, depth + 1):
            h_1TD = model.mtp[k - 1](h_1TD, model.embedding(tokens_1T.roll(-k, 1)), rope, None)
            logits_TV = model.head(model.norm(h_1TD))[0, : len(ids) - k - 1]
            nll[k - 1].append(F.cross_entropy(logits_TV, tokens_1T[0, k + 1 :], reduction="none"))
    losses, c = batch_loss(model, packed), model.config
    torch.testing.assert_close(losses.mtp, torch.cat(sum(nll, [])).sum() / packed["weights"].sum() / depth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses.total, losses.lm + c.aux_weight * losses.aux + c.z_weight * losses.z + c.mtp_weight * losses.mtp)


def test_the_router_losses_are_means_over_layers_of_transformers(micro_model):
    tokens = torch.randint(0, 500, (2, 20), generator=torch.Generator().manual_seed(0))
    losses, routing = micro_model.loss(tokens, tokens), micro_model.hidden(tokens)[1]
    aux = [load_balancing_loss_func((logits_NE,), 4, 2) / 2 for logits_NE, _ in routing]  # its shares of the load sum to top-k
    z = [logits_NE.logsumexp(-1).square().mean() for logits_NE, _ in routing]
    torch.testing.assert_close((losses.aux, losses.z), (torch.stack(aux).mean(), torch.stack(z).mean()))


def test_the_router_losses_reach_every_router(micro_model):
    tokens = torch.randint(0, 500, (2, 20), generator=torch.Generator().manual_seed(0))
    for name in ("aux", "z"):
        loss = getattr(micro_model.loss(tokens, tokens), name)
        for grad in torch.autograd.grad(loss, [block.feed_forward.router.weight for block in micro_model.blocks]):
            assert grad.abs().max() > 0


def test_mtp_by_hand(micro_config):
    config = dataclasses.replace(micro_config, mtp_depth=1)
    torch.manual_seed(0)
    model = Compass(config)
    tokens = torch.randint(0, 500, (1, 10))
    targets = tokens.roll(-1, 1)
    weights = torch.ones(1, 10)
    weights[0, -1] = 0
    losses = model.loss(tokens, targets, weights)
    h, _, rope, mask = model.hidden(tokens)
    predicted = model.head(model.norm(model.mtp[0](h, model.embedding(tokens.roll(-1, 1)), rope, mask)))
    # position t has seen token t+1 and predicts token t+2
    torch.testing.assert_close(losses.mtp, F.cross_entropy(predicted[0, :8], tokens[0, 2:]) * 8 / 9, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name,total,active", [("v2_30b", 30.13, 5.22), ("v3_245b", 244.99, 70.94)])
def test_full_configs_have_the_published_size(name, total, active):
    counted = count_parameters(CONFIGS[name])
    assert round(counted[0] / 1e9, 2) == total and round(counted[1] / 1e9, 2) == active


def test_tiny_v3_has_the_size_of_tiny():
    a, b = count_parameters(CONFIGS["tiny"]), count_parameters(CONFIGS["tiny_v3"])
    assert abs(a[0] - b[0]) / a[0] < 0.01 and abs(a[1] - b[1]) / a[1] < 0.01
