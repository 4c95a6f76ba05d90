"""otpo.py: transport weights against POT, their bounds and invariances; the loss against DPO."""

import math

import ot
import pytest
import torch

import otpo
from dpo import dpo_loss
from otpo import ot_token_weights, otpo_loss, sinkhorn, sweeps_for, transported_mass, uniform_weights


def batch(seed, B=5, T=12, S=9, D=16, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    hidden = [torch.randn(B, n, D, generator=g, dtype=dtype) for n in (T, S)]
    masks = []
    for n in (T, S):  # answers of any length, somewhere in the row, padding around them
        start, length = torch.randint(0, n // 2, (B, 1), generator=g), torch.randint(1, n // 2 + 1, (B, 1), generator=g)
        place = torch.arange(n).expand(B, n)
        masks.append(((place >= start) & (place < start + length)).to(dtype))
    return (*hidden, *masks)


def pot_weights(h_c, h_r, m_c, m_r, reg, reg_marginal):
    """The same by POT, one pair at a time, without padding."""
    out_c, out_r = torch.zeros_like(m_c), torch.zeros_like(m_r)
    for b in range(len(h_c)):
        c, r = h_c[b][m_c[b] > 0], h_r[b][m_r[b] > 0]
        cost = torch.cdist(c, r, compute_mode="donot_use_mm_for_euclid_dist")
        cost = cost / max(1.0, cost.max().item())
        plan = ot.unbalanced.sinkhorn_unbalanced(
            torch.ones(len(c), dtype=c.dtype), torch.ones(len(r), dtype=c.dtype), cost, reg, reg_marginal,
            method="sinkhorn", reg_type="entropy", numItermax=10_000, stopThr=1e-15,
        )  # fmt: skip
        tau = min(len(c), len(r))
        out_c[b][m_c[b] > 0], out_r[b][m_r[b] > 0] = tau * plan.sum(1) / plan.sum(), tau * plan.sum(0) / plan.sum()
    return out_c, out_r


@pytest.mark.parametrize("reg,reg_marginal", [(1.0, 0.2), (0.1, 0.2), (0.5, 1.0), (5.0, 0.05)])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-8), (torch.float32, 1e-5)])
def test_weights_equal_pot(reg, reg_marginal, dtype, tolerance):
    for seed in range(5):
        h_c, h_r, m_c, m_r = batch(seed)
        ours = ot_token_weights(h_c.to(dtype), h_r.to(dtype), m_c.to(dtype), m_r.to(dtype), reg, reg_marginal)
        for w, reference in zip(ours, pot_weights(h_c, h_r, m_c, m_r, reg, reg_marginal), strict=True):
            torch.testing.assert_close(w.double(), reference, rtol=tolerance, atol=tolerance)


def test_equal_states_of_a_common_beginning_cost_nothing():
    """|x|² + |y|² - 2 x·y alone would leave them apart in fp32: a plan that differs from POT's in the fourth digit."""
    h_c, h_r, m_c, m_r = batch(7, T=40, S=40, D=128)
    m_c, m_r = torch.ones_like(m_c), torch.ones_like(m_r)
    h_r[:, :30] = h_c[:, :30]
    ours = ot_token_weights(h_c.float(), h_r.float(), m_c, m_r)
    for w, reference in zip(ours, pot_weights(h_c, h_r, m_c, m_r, 1.0, 0.2), strict=True):
        torch.testing.assert_close(w.double(), reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reg", [0.05, 1.0])
def test_transported_mass_is_that_of_the_plan(reg):
    _, _, m_c, m_r = batch(8)
    cost = torch.rand(5, 12, 9, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    plan = sinkhorn(cost, m_c, m_r, reg, 0.2, sweeps_for(reg, 0.2))
    for mass, sums in zip(transported_mass(cost, m_c, m_r, reg, 0.2), (plan.sum(2), plan.sum(1)), strict=True):
        torch.testing.assert_close(mass, sums, rtol=1e-6, atol=1e-9)


def test_the_plan_by_hand():
    # one token each side: G = exp(lu + lv - M / reg) with lu = lv = f (M / reg) / (1 + f), f = 1/6; M = 1.2 gives exp(0.3429 - 1.2)
    plan = sinkhorn(torch.full((1, 1, 1), 1.2), torch.ones(1, 1), torch.ones(1, 1), 1.0, 0.2, 20)
    assert plan.item() == pytest.approx(math.exp(2 / 7 * 1.2 - 1.2), rel=1e-5)


def test_both_sides_sum_to_the_shorter_length():
    h_c, h_r, m_c, m_r = batch(1)
    w_c, w_r = ot_token_weights(h_c, h_r, m_c, m_r)
    shorter = torch.minimum(m_c.sum(1), m_r.sum(1))
    for w, mask in ((w_c, m_c), (w_r, m_r)):
        torch.testing.assert_close(w.sum(1), shorter)
        assert (w[mask == 0] == 0).all() and (w[mask > 0] > 0).all()


def test_a_constant_shift_of_the_cost_changes_no_weight():
    g = torch.Generator().manual_seed(0)
    cost, a, b = torch.rand(3, 7, 5, generator=g, dtype=torch.float64), torch.ones(3, 7).double(), torch.ones(3, 5).double()
    plans = [sinkhorn(cost + shift, a, b, 1.0, 0.2, 40) for shift in (0.0, 2.5)]
    shares = [plan.sum(2) / plan.sum((1, 2)).unsqueeze(1) for plan in plans]
    torch.testing.assert_close(*shares, rtol=1e-9, atol=1e-9)
    assert plans[0].sum() > 1.5 * plans[1].sum()


def test_blunt_transport_is_uniform_and_weights_are_bounded():
    h_c, h_r, m_c, m_r = batch(2)
    for w, even in zip(ot_token_weights(h_c, h_r, m_c, m_r, reg=1e6), uniform_weights(m_c, m_r), strict=True):
        torch.testing.assert_close(w, even.double(), rtol=1e-4, atol=1e-6)
    for reg, reg_marginal in ((1.0, 0.2), (0.2, 0.2)):
        for w in ot_token_weights(h_c, h_r, m_c, m_r, reg, reg_marginal):
            ratio = [(row[row > 0].max() / row[row > 0].min()).item() for row in w]
            assert 1 < max(ratio) <= math.exp(1 / (reg + reg_marginal)) + 1e-9


def test_sweeps_suffice():
    assert sweeps_for(1.0, 0.2) == 6 and sweeps_for(0.1, 0.2) == 23
    h_c, h_r, m_c, m_r = batch(3)
    cost = torch.cdist(h_c, h_r) / 12
    for reg in (1.0, 0.1):
        few, many = (sinkhorn(cost, m_c, m_r, reg, 0.2, n) for n in (sweeps_for(reg, 0.2), 500))
        torch.testing.assert_close(few, many, rtol=1e-6, atol=1e-9)


def test_padding_and_gradients_stay_out():
    h_c, h_r, m_c, m_r = batch(4)
    h_c.requires_grad_()
    w = ot_token_weights(h_c, h_r, m_c, m_r)
    assert not any(x.requires_grad for x in w)
    other_c, other_r = (torch.where(m.unsqueeze(-1) > 0, h.detach(), 1e3) for h, m in ((h_c, m_c), (h_r, m_r)))
    for ours, theirs in zip(w, ot_token_weights(other_c, other_r, m_c, m_r), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_all_ones_weights_give_dpo():
    g = torch.Generator().manual_seed(5)
    *_, m_c, m_r = batch(5)
    logps = [(-torch.rand(*m.shape, generator=g, dtype=torch.float64) * m).requires_grad_() for m in (m_c, m_r, m_c, m_r)]
    results = []
    for weighted in (True, False):
        for x in logps:
            x.grad = None
        out = otpo_loss(*logps, m_c, m_r, 0.3) if weighted else dpo_loss(*(x.sum(1) for x in logps), 0.3)
        out[0].backward()
        results.append((*out, logps[0].grad * m_c, logps[1].grad * m_r))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_bad_input_is_named():
    h_c, h_r, m_c, m_r = batch(6)
    m_r[3] = 0
    with pytest.raises(ValueError, match="pair 3 has an empty answer"):
        ot_token_weights(h_c, h_r, m_c, m_r)
    with pytest.raises(ValueError, match="reg is 0.01"):
        ot_token_weights(h_c, h_r, m_c, torch.ones_like(m_r), reg=0.01)
    with pytest.raises(ValueError, match="reg_marginal is 0"):
        ot_token_weights(h_c, h_r, m_c, torch.ones_like(m_r), reg_marginal=0)
    for settings in ({"reg": math.inf}, {"reg": math.nan}, {"reg_marginal": math.inf}, {"reg_marginal": math.nan}, {"reg_marginal": 101}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} is {next(iter(settings.values()))}"):  # a hang, or nan
            ot_token_weights(h_c, h_r, m_c, torch.ones_like(m_r), **settings)
    with pytest.raises(ValueError, match="reg is 0.01"):
        sinkhorn(torch.zeros(1, 1, 1), torch.ones(1, 1), torch.ones(1, 1), 0.01, 0.2, 5)


def test_prompts_cost_nothing_and_autocast_changes_nothing(monkeypatch):
    """Answers behind long prompts and before padding, in any place: the weights of the answers alone; only answers reach the costs."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 3, 12, 16, generator=g)
    lengths, starts = ((3, 7, 1), (5, 2, 6)), ((200, 0, 50), (3, 180, 20))
    wide, masks = torch.zeros(2, 3, 300, 16), torch.zeros(2, 3, 300)
    narrow = torch.zeros(2, 3, 12)
    for side in range(2):
        for pair in range(3):
            n, at = lengths[side][pair], starts[side][pair]
            wide[side, pair, at : at + n], masks[side, pair, at : at + n], narrow[side, pair, :n] = hidden[side, pair, :n], 1, 1
    seen = []
    monkeypatch.setattr(otpo, "distances", lambda x, y, distances=otpo.distances: seen.append((*x.shape, *y.shape)) or distances(x, y))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ot_token_weights(*wide, *masks)
    assert seen == [(3, 7, 16, 3, 6, 16)]
    for weights, mask, alone, short in zip(found, masks, ot_token_weights(*hidden, *narrow), narrow, strict=True):
        assert weights.dtype == torch.float32
        torch.testing.assert_close(weights[mask > 0], alone[short > 0], rtol=1e-6, atol=1e-6)
        assert (weights[mask == 0] == 0).all()
