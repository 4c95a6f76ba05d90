"""engine.py: requests that come and go are answered as if alone, drafts change nothing, every request ends with a reason."""

import copy
import dataclasses
import gc
import random
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from compass import CONFIGS, Compass
from engine import Engine, Sampling, candidates, draw, filtered_probs
from generate import GREEDY, generate, stream
from kvcache import KVCache

HOT = Sampling(temperature=1.5, top_k=0, top_p=1.0, repetition=1.0, max_tokens=16)


@pytest.fixture(autouse=True)
def more_certain(micro_model):
    """Random logits are nearly flat; sharper ones make choices robust against rounding."""
    with torch.no_grad():
        micro_model.head.weight.mul_(4)
    micro_model.eval()


def random_requests(rng, count, stops=("e", "an ", "ing")):
    """Arguments of submit: prompts of 1 to 30 tokens, some alike; greedy, the report's settings, hot, with and without stops."""
    prompts = [[rng.randrange(500) for _ in range(rng.randint(1, 30))] for _ in range(max(2, count // 3))]
    made = []
    for i in range(count):
        kind = rng.choice((GREEDY, Sampling(), HOT, Sampling(repetition=1.3, temperature=0.0, top_k=0, top_p=1.0)))
        sampling = dataclasses.replace(kind, max_tokens=rng.randint(1, 25), seed=rng.randrange(3))
        made.append((rng.choice(prompts), sampling, i % 4, rng.sample(stops, rng.randint(0, 2))))
    return made


def outcome(request):
    return request.ids, request.text, request.stopped, request.error


def scripted(model, answer):
    """Make the model say these ids after any prompt that ends in token 3, and 0 for ever after them."""

    def hidden(tokens_BT, positions_BT=None, **_):
        nonlocal start
        script = torch.tensor([*answer, *[0] * 64])
        if positions_BT is None:  # prefill: nothing is asked
            return F.one_hot(tokens_BT, model.config.vocab_size).float(), None, None, None
        start = positions_BT[0, 0].item() if tokens_BT[0, 0] == 3 and start is None else start
        return F.one_hot(script[positions_BT - start], model.config.vocab_size) * 50.0, None, None, None

    start = None
    model.hidden, model.norm, model.head = hidden, torch.nn.Identity(), torch.nn.Identity()


@pytest.mark.parametrize("rows", (1, 3, 16))
def test_each_request_is_answered_as_if_alone(micro_model, micro_tokenizer, rows):
    """Arrivals in the middle, departures by every cause, rows refilled and moved: no answer notices."""
    rng = random.Random(rows)
    wanted = random_requests(rng, 40)
    alone = []
    for request in wanted:
        engine = Engine(micro_model, micro_tokenizer, rows=1)
        alone.append(engine.submit(*request))
        engine.run()
    engine, together = Engine(micro_model, micro_tokenizer, rows), []
    for request in wanted:
        together.append(engine.submit(*request))
        for _ in range(rng.randrange(3)):
            engine.step()
    engine.run()
    assert [outcome(r) for r in together] == [outcome(r) for r in alone]
    for a, b in zip(together, alone, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-3)
    assert {r.stopped for r in alone} == {True, False} and any("e" in r.stops for r in alone)


def test_a_shared_prompt_is_prefilled_once(micro_model, micro_tokenizer, monkeypatch):
    seen, hidden = [], micro_model.hidden

    def counting(tokens_BT, **kwargs):
        if "positions_BT" not in kwargs:
            seen.append(tuple(tokens_BT.shape))
        return hidden(tokens_BT, **kwargs)

    micro_model.hidden = counting
    engine = Engine(micro_model, micro_tokenizer, rows=4)
    empty = engine.bytes
    requests = [engine.submit([5] * 21, HOT, sample) for sample in range(9)]
    engine.step()
    assert seen == [(1, 20)]
    per_token = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, width, bytes
    assert empty == 4 * 64 * per_token and engine.bytes == empty + 20 * per_token
    engine.run()
    assert seen == [(1, 20)] and engine.bytes == empty and all(r.ids for r in requests)
    monkeypatch.setattr("engine.PREFILL_TOKENS", 60)
    seen.clear()
    others = [engine.submit([token] * 21, HOT) for token in range(5, 9)]
    engine.run()
    assert seen == [(3, 20), (1, 20)] and all(r.ids for r in others)


def test_prefill_holds_one_cache_beside_the_rows(micro_model, micro_tokenizer, monkeypatch):
    """PREFILL_TOKENS bounds what prompts take in all: a batch's cache is gone before the next one is made."""
    alive, most = weakref.WeakSet(), []

    class Counted(KVCache):
        def __init__(self, *args):
            super().__init__(*args)
            alive.add(self)
            most.append(len(alive))

    monkeypatch.setattr("engine.KVCache", Counted)
    monkeypatch.setattr("engine.PREFILL_TOKENS", 1)
    engine = Engine(micro_model, micro_tokenizer, rows=4)
    requests = [engine.submit([token] * 21, HOT) for token in range(5, 9)]
    engine.run()
    assert most == [1, 2, 2, 2, 2] and all(r.ids for r in requests)


def trained(depth, seed):
    """A micro model with MTP that has learnt sequences of period three, so that some guesses are right."""
    torch.manual_seed(seed)
    config = dataclasses.replace(
        CONFIGS["tiny_v3"], n_layers=1, dim=32, n_heads=4, n_kv_heads=2, head_dim=8, n_experts=4, top_k=2, expert_dim=16, vocab_size=512,
        max_seq_len=64, mtp_depth=depth, mtp_weight=1.0,
    )  # fmt: skip
    model = Compass(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        tokens_BT = torch.randint(20, (16, 3)).repeat(1, 8)
        optimizer.zero_grad()
        model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:]).total.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize(("depth", "seed"), ((1, 0), (1, 1), (2, 0)))
def test_drafting_changes_no_answer(micro_tokenizer, depth, seed):
    """Greedy, with a penalty, sampled; one row and ragged batches; right guesses and wrong ones."""
    model, rng = trained(depth, seed), random.Random(seed)
    wanted = random_requests(rng, 24)
    wanted += [([1, 2, 3] * k, dataclasses.replace(GREEDY, max_tokens=30), 0) for k in range(1, 5)]
    for rows in (1, 5):
        plain, drafting = (Engine(model, micro_tokenizer, rows, draft=draft) for draft in (False, True))
        answers = []
        for engine in (plain, drafting):
            requests = [engine.submit(*request) for request in wanted]
            engine.run()
            answers.append([outcome(request) for request in requests])
        assert answers[0] == answers[1]
        assert 0 < drafting.accepted < drafting.drafted and drafting.steps < plain.steps and plain.drafted == 0
    drafted, plain = (generate(model, micro_tokenizer, [[1, 2, 3] * 4], GREEDY, draft=draft)[0] for draft in (True, False))
    assert drafted.ids == plain.ids and drafted.logprobs == pytest.approx(plain.logprobs, abs=1e-4)
    assert "".join(stream(model, micro_tokenizer, [1, 2, 3] * 4, GREEDY)) == plain.text


def test_a_thinking_budget_holds_while_drafting(micro_tokenizer):
    """The thought is closed right after its budget, also where that place was drafted and the draft was right."""
    model, tokenizer, prompt = trained(1, 0), copy.copy(micro_tokenizer), [1, 2, 3] * 4
    tokenizer.special = {**tokenizer.special, "<think>": generate(model, tokenizer, [prompt], GREEDY)[0].ids[0]}
    for budget in (0, 1, 2, 5):
        sampling = dataclasses.replace(GREEDY, max_tokens=12, think_budget=budget)
        drafted, plain = (generate(model, tokenizer, [prompt], sampling, draft=draft)[0].ids for draft in (True, False))
        assert drafted == plain and plain.index(tokenizer.special["</think>"]) == 1 + budget


def test_filters_equal_transformers():
    from transformers.generation.logits_process import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    g = torch.Generator().manual_seed(0)
    for s in (Sampling(), Sampling(1.0, 0, 0.6, 1.3), Sampling(0.7, 3, 1.0, 1.0), Sampling(2.0, 50, 0.9, 0.8)):
        logits, tokens = torch.randn(8, 100, generator=g) * 2, torch.randint(100, (8, 15), generator=g)
        theirs = [RepetitionPenaltyLogitsProcessor(s.repetition), TemperatureLogitsWarper(s.temperature)]
        theirs += [TopKLogitsWarper(s.top_k)] if s.top_k else []
        theirs += [TopPLogitsWarper(s.top_p)] if s.top_p < 1 else []
        seen = torch.zeros(8, 100, dtype=torch.bool).scatter_(1, tokens, True)
        expected = LogitsProcessorList(theirs)(tokens, logits.clone()).softmax(-1)
        torch.testing.assert_close(filtered_probs(logits, seen, s), expected, rtol=1e-5, atol=1e-6)


def test_draws_follow_the_distribution():
    """Random numbers spread evenly over [0, 1) give every id its share, and an id without probability never comes."""
    g, n = torch.Generator().manual_seed(0), 20_000
    u_B1 = (torch.arange(n, dtype=torch.float64).unsqueeze(1) + 0.5) / n
    for s in (Sampling(), Sampling(1.0, 0, 0.6), HOT):
        logits = torch.randn(1, 30, generator=g) * 2
        logits[0, 29] = -torch.inf
        probs = filtered_probs(logits, logits > 9, s)[0]
        ids = draw(*(x if x is None else x.expand(n, -1) for x in candidates(logits, logits > 9, s)), u_B1)
        share = torch.bincount(ids, minlength=30) / n
        torch.testing.assert_close(share, probs, rtol=0, atol=2e-4)
        assert (share[probs == 0] == 0).all()
    edge = draw(torch.tensor([[0.5, 0.5, 0.0]]), None, torch.tensor([[1 - 2**-53]], dtype=torch.float64))
    assert edge.item() == 1


def test_a_stream_never_cuts_a_character_or_shows_a_stop(micro_model, micro_tokenizer):
    text = "ราคา 5 บาท — 买 END later"
    ids = micro_tokenizer.encode(text)
    assert any("\ufffd" in micro_tokenizer.decode([i]) for i in ids)  # some characters take several tokens
    for stops, expected in (((), text), (("END",), "ราคา 5 บาท — 买 "), (("ENX", "EN"), "ราคา 5 บาท — 买 "), (("ENX",), text)):
        scripted(micro_model, ids)
        greedy = dataclasses.replace(GREEDY, max_tokens=len(ids))
        pieces = list(stream(micro_model, micro_tokenizer, [3], greedy, stops))
        assert "".join(pieces) == expected and len(pieces) > 4 and not any("\ufffd" in piece for piece in pieces)
        scripted(micro_model, ids)
        answer = generate(micro_model, micro_tokenizer, [[3]], greedy, stops=stops)[0]
        assert answer.text == expected and answer.stopped == (expected != text) and answer.ids == ids[: len(answer.ids)]
    scripted(micro_model, ids[:1] + micro_tokenizer.encode("龘")[:1])  # a rare character, of several tokens: it stays unfinished
    assert generate(micro_model, micro_tokenizer, [[3]], dataclasses.replace(GREEDY, max_tokens=2))[0].text.endswith("\ufffd")


@pytest.mark.parametrize("draft", (False, True))
def test_a_thousand_requests(micro_model, micro_tokenizer, draft):
    """Faulty ones refused, some cancelled while they wait or speak, all others answered; memory as before."""
    rng = random.Random(1)
    micro_model = trained(1, 0) if draft else micro_model
    bad = [([], GREEDY), ([9] * 64, GREEDY), ([512], GREEDY), ([5], Sampling(max_tokens=0)), ([5], GREEDY, 0, [""])]
    with torch.no_grad():
        micro_model.embedding.weight[499] = torch.nan
    engine = Engine(micro_model, micro_tokenizer, rows=24, draft=draft)
    engine.submit([1, 2], GREEDY)
    engine.run()
    gc.collect()
    empty, tensors, requests, cancelled = engine.bytes, sum(type(x) is torch.Tensor for x in gc.get_objects()), [], []
    wanted = [rng.choice(bad) if rng.random() < 0.1 else request for request in random_requests(rng, 1000)]
    for request in wanted:
        requests.append(engine.submit(*request))
        if rng.random() < 0.1:
            cancelled.append(rng.choice(requests[-40:]))
            engine.cancel(cancelled[-1])
        if rng.random() < 0.3:
            engine.step()
    engine.run()
    assert all(r.done for r in requests) and len(requests) == 1000
    poisoned = [r for r in requests if "not finite" in (r.error or "")]
    assert len(poisoned) > 5 and all(499 in [*r.prompt, *r.ids] for r in poisoned)
    assert not any(499 in r.prompt for r in requests if not r.error and r not in cancelled)
    faults = {"0 tokens", "64 tokens", "outside the vocabulary", "max_tokens is 0", "empty stop string", "not finite"}
    errors = [r.error for r in requests if r.error]
    assert all(sum(fault in error for error in errors) for fault in faults)
    assert all(any(fault in error for fault in faults) for error in errors)
    for request in requests:
        if not request.error and request not in cancelled:
            full = len(request.ids) == min(request.sampling.max_tokens, 64 - len(request.prompt))
            assert request.stopped or full
            assert torch.tensor(request.logprobs).isfinite().all() and len(request.logprobs) == len(request.ids)
    assert engine.bytes == empty and not (any(engine.live) or engine.waiting or engine.users or engine.prefixes)
    assert {len(r.ids) for r in cancelled} > {0}
    requests.clear(), cancelled.clear(), poisoned.clear()
    del request
    gc.collect()
    assert sum(type(x) is torch.Tensor for x in gc.get_objects()) == tensors


def test_memory_does_not_grow_with_the_queue(micro_model, micro_tokenizer):
    """Each of 40 prompts waits twice, first all once: no more prefixes than rows are held, and the answers are those of one alone."""
    prompts = [[i, *range(40)] for i in range(40)]
    greedy = dataclasses.replace(GREEDY, max_tokens=5)
    alone = [made.ids for made in generate(micro_model, micro_tokenizer, prompts, greedy)]
    for rows in (1, 3):
        engine = Engine(micro_model, micro_tokenizer, rows)
        requests, most = [engine.submit(prompt, greedy) for prompt in prompts * 2], 0
        while engine.step():
            most = max(most, engine.bytes)
        assert [request.ids for request in requests] == alone * 2
        assert engine.cache.bytes < most <= 2 * engine.cache.bytes


def test_settings_out_of_range_are_named(micro_model, micro_tokenizer):
    engine = Engine(micro_model, micro_tokenizer, rows=1)
    faults = {
        "temperature": (-0.1, float("nan"), 1e-38, "0.4"), "top_k": (-1, 0.5), "top_p": (0.0, 1.1, float("nan"), None),
        "repetition": (0.0, float("inf"), 1e-40, "x"), "max_tokens": (0, 2.5), "think_budget": (-1, 2.5, "3"),
    }  # fmt: skip
    for name, values in faults.items():
        for value in values:
            request = engine.submit([1], dataclasses.replace(GREEDY, **{name: value}))
            assert request.done and request.error.startswith(f"{name} is {value}, must be")
    assert not engine.step()
    assert "a stop that is no text" in engine.submit([1], GREEDY, stops=[3]).error
    assert not Sampling(max_tokens=np.int64(5), temperature=np.float32(0.5)).fault()
    assert engine.submit([1], GREEDY, stops="2,").stops == ("2,",)  # one string, not its letters


@pytest.mark.parametrize("sampling", (GREEDY, HOT))
@pytest.mark.parametrize("rows", (1, 3))
def test_a_prefill_that_fails_leaves_its_requests_waiting(micro_model, micro_tokenizer, monkeypatch, rows, sampling):
    """Out of memory, or Ctrl-C, while prompts are prefilled: a row must not go on with the keys of its last request, nor draw other
    random numbers."""
    engine = Engine(micro_model, micro_tokenizer, rows=rows)
    for i in range(rows):
        engine.submit([i, 7, 9, 11], GREEDY)
    engine.run()
    fresh = [engine.submit([20 + i, 21, 22, 23, 24], dataclasses.replace(sampling, max_tokens=9)) for i in range(2 * rows)]
    hidden = micro_model.hidden
    monkeypatch.setattr(micro_model, "hidden", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert [request.prompt for request in engine.waiting] == [request.prompt for request in fresh] and not any(engine.live)
    monkeypatch.setattr(micro_model, "hidden", hidden)
    engine.run()
    for request in fresh:
        [alone] = generate(micro_model, micro_tokenizer, [list(request.prompt)], request.sampling)
        assert request.ids == alone.ids
    assert not engine.users and not engine.prefixes


@pytest.mark.parametrize("shared", (False, True))
def test_attention_over_the_cache_is_as_precise_in_bf16_as_torchs(shared):
    g, config = torch.Generator().manual_seed(0), dataclasses.replace(CONFIGS["tiny"], n_layers=1, head_dim=128)
    q_BHTC, k_BGMC, v_BGMC = (torch.randn(2, n, m, 128, generator=g) * s for n, m, s in ((8, 1, 2.0), (4, 512, 2.0), (4, 512, 1.0)))
    k_BGMC, v_BGMC = (x[:1].expand(2, -1, -1, -1) for x in (k_BGMC, v_BGMC)) if shared else (k_BGMC, v_BGMC)
    low = [x.bfloat16() for x in (q_BHTC, k_BGMC, v_BGMC)]
    exact = F.scaled_dot_product_attention(*(x.double() for x in low), enable_gqa=True)
    torchs = F.scaled_dot_product_attention(*low, attn_mask=torch.ones(1, 512, dtype=torch.bool), enable_gqa=True)
    cache = KVCache(config, 2, 512, "cpu", torch.bfloat16)
    cache.k[0, :, :, :511], cache.v[0, :, :, :511] = (x[:, :, :511] for x in low[1:])
    if shared:  # all but the last token is a common prefix; it alone lies in slot 0
        cache.shared, cache.first_B = [(cache.prefix(0, 511), slice(None))], torch.tensor([511, 511])
    cache.advance(torch.full((2, 1), 511))
    ours = cache.attend(0, low[0], *(x[:, :, 511:] for x in low[1:]))
    errors = [(x.double() - exact).norm() / exact.norm() for x in (ours, torchs)]
    assert errors[0] < 1.6 * errors[1] < 0.006


def test_a_moved_row_and_a_poisoned_row(micro_model, micro_tokenizer):
    """The last row moves into a gap once nobody waits; a request with NaN logits takes no other down, now or in its row later."""
    with torch.no_grad():
        micro_model.embedding.weight[499] = torch.nan
    longer = dataclasses.replace(GREEDY, max_tokens=20)
    alone = generate(micro_model, micro_tokenizer, [[7, 8, 9], [4] * 9], longer)
    engine = Engine(micro_model, micro_tokenizer, rows=3)
    poisoned, last = engine.submit([5, 499, 6], longer), engine.submit([7, 8, 9], longer)
    engine.step()
    assert "not finite" in poisoned.error and engine.live == [None, last]
    engine.step()
    assert engine.live == [last]
    later = engine.submit([4] * 9, longer)
    engine.run()
    assert [last.ids, later.ids] == [completion.ids for completion in alone]


def test_a_poisoned_row_leaves_no_drafts_behind(micro_config, micro_tokenizer):
    """The MTP blocks run after the main model: what they made of the poisoned row must go with it."""
    torch.manual_seed(0)
    model = Compass(dataclasses.replace(micro_config, mtp_depth=1))
    with torch.no_grad():
        model.embedding.weight[499] = torch.nan
    engine = Engine(model, micro_tokenizer, rows=2, draft=True)
    engine.submit([7, 8, 9], dataclasses.replace(GREEDY, max_tokens=20))
    poisoned = engine.submit([5, 499, 6], GREEDY)
    engine.step()
    assert "not finite" in poisoned.error and engine.cache.k[:, 1].isfinite().all() and engine.cache.v[:, 1].isfinite().all()


def test_a_row_that_stands_empty_stays_finite(micro_model, micro_tokenizer):
    """Its prompt was a shared prefix, so its own slot 0 was a late position; idle until two rows are free, it must not spoil the next."""
    engine = Engine(micro_model, micro_tokenizer, rows=16)
    sharing = [engine.submit([6] * 40, HOT, sample) for sample in range(2)]
    others = [engine.submit([7 + i] * (30 if i < 14 else 2), dataclasses.replace(HOT, max_tokens=4 + 2 * (i > 0))) for i in range(20)]
    engine.step()
    engine.cancel(sharing[0])
    engine.step()
    assert engine.live[0] is None and engine.waiting
    engine.run()
    assert not any(request.error for request in (*sharing, *others)) and all(len(request.ids) for request in others)


def test_each_place_has_its_own_random_number(micro_model, micro_tokenizer):
    """With all tokens equally likely an answer follows its random numbers alone, and they differ by place and by sample."""
    micro_model.norm = micro_model.head = torch.nn.Identity()
    micro_model.hidden = lambda tokens_BT, **_: (torch.zeros(*tokens_BT.shape, 512), None, None, None)
    first, second = generate(micro_model, micro_tokenizer, [[5]], HOT, n=2)
    assert len(set(first.ids)) > 0.8 * len(first.ids) > 5 and first.ids[0] != second.ids[0]
    one, other = generate(micro_model, micro_tokenizer, [[5], [6]], HOT)
    assert one.ids == first.ids and other.ids[0] != one.ids[0]
