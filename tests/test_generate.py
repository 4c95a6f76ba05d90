"""generate.py: cached equals uncached, batches equal single requests, sampling equals a hand-written filter."""

import math

import numpy as np
import pytest
import torch

from engine import Engine, Sampling, filtered_probs
from generate import GREEDY, chat, generate, shown, split_thought, stream
from kvcache import KVCache

PROMPTS = [[5, 9, 300], [17] * 11, [300, 2], [44, 45, 46, 47, 48, 49]]


@pytest.fixture(autouse=True)
def more_certain(micro_model):
    """Random logits are nearly flat; sharper ones make greedy choices robust against rounding."""
    with torch.no_grad():
        micro_model.head.weight.mul_(4)


def test_cached_logits_equal_uncached(micro_model):
    tokens = torch.randint(0, 500, (2, 12))
    full = micro_model(tokens)
    cache = KVCache(micro_model.config, 2, 16, "cpu")
    first = micro_model(tokens[:, :7], cache=cache)
    steps = [micro_model(tokens[:, t : t + 1], positions_BT=torch.full((2, 1), t), cache=cache) for t in range(7, 12)]
    torch.testing.assert_close(torch.cat([first, *steps], 1), full, rtol=1e-4, atol=1e-4)


def test_greedy_is_uncached_argmax(micro_model, micro_tokenizer):
    sampling = Sampling(temperature=0, repetition=1.0, max_tokens=12)
    stops = {micro_tokenizer.special["<|end|>"], micro_tokenizer.special["<|endoftext|>"]}
    for prompt, completion in zip(PROMPTS, generate(micro_model, micro_tokenizer, PROMPTS, sampling), strict=True):
        ids, expected, logprobs = list(prompt), [], []
        for _ in range(12):
            logits = micro_model(torch.tensor([ids]))[0, -1, : micro_tokenizer.n_vocab]
            token = logits.argmax().item()
            if token in stops:
                break
            ids.append(token)
            expected.append(token)
            logprobs.append(logits.log_softmax(0)[token].item())
        assert completion.ids == expected
        assert completion.logprobs == pytest.approx(logprobs, abs=1e-3)


@pytest.mark.parametrize("penalty", (0.2, 1.5))
@torch.no_grad()
def test_the_penalty_is_on_all_that_was_said(micro_model, micro_tokenizer, penalty):
    """Prompt and answer so far, by hand at each step; below 1 it rewards repetition, so that the prompt's tokens show."""
    sampling = Sampling(temperature=0, repetition=penalty, max_tokens=8)
    stops = {micro_tokenizer.special["<|end|>"], micro_tokenizer.special["<|endoftext|>"]}
    for prompt, completion in zip(PROMPTS, generate(micro_model, micro_tokenizer, PROMPTS, sampling), strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + 8:
            logits = micro_model(torch.tensor([ids]))[0, -1, : micro_tokenizer.n_vocab]
            for token in set(ids):
                logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
            ids.append(logits.argmax().item())
            if ids[-1] in stops:
                ids.pop()
                break
        assert completion.ids == ids[len(prompt) :]


def test_the_defaults_are_the_reports():
    assert Sampling() == Sampling(0.4, 5, 0.85, 1.05, 2048, 42, None)


def test_rows_together_are_bounded(micro_model, micro_tokenizer, monkeypatch):
    made = []
    monkeypatch.setattr("generate.Engine", lambda *given, **more: made.append(given[2]) or Engine(*given, **more))
    assert len(generate(micro_model, micro_tokenizer, PROMPTS, Sampling(max_tokens=2), n=3, max_rows=5)) == 12
    generate(micro_model, micro_tokenizer, PROMPTS[:1], Sampling(max_tokens=2), max_rows=5)
    assert made == [5, 1]


def test_batch_equals_one_by_one(micro_model, micro_tokenizer):
    for sampling in (GREEDY, Sampling(max_tokens=16), Sampling(temperature=1.5, top_k=0, top_p=1.0, max_tokens=16)):
        together = generate(micro_model, micro_tokenizer, PROMPTS, sampling, n=3)
        small = generate(micro_model, micro_tokenizer, PROMPTS, sampling, n=3, max_rows=5)
        alone = [c for p in PROMPTS for c in generate(micro_model, micro_tokenizer, [p], sampling, n=3)]
        assert [c.ids for c in together] == [c.ids for c in alone] == [c.ids for c in small]
        for a, b in zip(together, alone, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4) and a.stopped == b.stopped


def test_seed_decides(micro_model, micro_tokenizer):
    def hot(seed):
        sampling = Sampling(temperature=2.0, top_k=0, top_p=1.0, max_tokens=10, seed=seed)
        return [c.ids for c in generate(micro_model, micro_tokenizer, PROMPTS[:1], sampling, n=4)]

    assert hot(1) == hot(1) != hot(2) and len({tuple(ids) for ids in hot(1)}) > 1


def by_hand(logits, seen, s):
    """The filters, one token at a time."""
    logits = [(x / s.repetition if x > 0 else x * s.repetition) if hit else x for x, hit in zip(logits, seen, strict=True)]
    weights = [math.exp(x / s.temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -weights[i])[: s.top_k or None]
    kept, mass, total = [], 0.0, sum(weights[i] for i in order)
    for i in order:
        if mass / total >= s.top_p:
            break
        kept.append(i)
        mass += weights[i]
    return [weights[i] / mass if i in kept else 0.0 for i in range(len(logits))]


def test_sampling_equals_a_hand_written_filter():
    g = torch.Generator().manual_seed(0)
    for s in (Sampling(), Sampling(1.0, 0, 0.6, 1.3), Sampling(0.7, 3, 1.0, 1.0), Sampling(2.0, 0, 1.0, 1.0)):
        logits, seen = torch.randn(8, 20, generator=g) * 2, torch.rand(8, 20, generator=g) < 0.3
        probs = filtered_probs(logits, seen, s)
        for row in range(8):
            assert probs[row].tolist() == pytest.approx(by_hand(logits[row].tolist(), seen[row].tolist(), s), abs=1e-5)


def test_a_model_in_bf16_answers(micro_model, micro_tokenizer):
    """As load_for_inference makes it on a GPU: few rows take another path through the experts than many."""
    sampling = Sampling(temperature=0, repetition=1.0, max_tokens=6)
    exact = generate(micro_model, micro_tokenizer, PROMPTS, sampling)
    for name, p in micro_model.named_parameters():
        p.data = p.data if name.endswith("router.weight") else p.data.to(torch.bfloat16)
    one, many = (generate(micro_model, micro_tokenizer, PROMPTS * n, sampling) for n in (1, 20))
    assert len(one) == 4 and len(many) == 80
    for answers in (one, many[:4], many[-4:]):
        close = [a.ids[:1] == b.ids[:1] and abs(a.logprobs[0] - b.logprobs[0]) < 0.1 for a, b in zip(answers, exact, strict=True)]
        assert sum(close) >= 3  # rounding may turn a near tie between two experts


def test_limits_and_bad_prompts(micro_model, micro_tokenizer):
    full = generate(micro_model, micro_tokenizer, [[5] * 60], Sampling(temperature=2.0, top_k=0, top_p=1.0))[0]
    assert full.stopped or len(full.ids) == 4  # the context of 64 ends it
    assert generate(micro_model, micro_tokenizer, [np.array([5, 6])], GREEDY) == generate(micro_model, micro_tokenizer, [[5, 6]], GREEDY)
    for prompts, message in (([[5] * 64], "prompt 0 has 64"), ([[1], []], "prompt 1 has 0"), ([[512]], "outside the vocabulary")):
        with pytest.raises(ValueError, match=message):
            generate(micro_model, micro_tokenizer, prompts, GREEDY)
    with pytest.raises(ValueError, match="max_tokens is 0"):
        generate(micro_model, micro_tokenizer, [[1]], Sampling(max_tokens=0))
    for answer in (lambda settings: generate(micro_model, micro_tokenizer, [[1]], settings),
                   lambda settings: next(stream(micro_model, micro_tokenizer, [1], settings))):  # fmt: skip
        with pytest.raises(ValueError, match="max_tokens is 2.5, must be a whole number"):
            answer(Sampling(max_tokens=2.5))
    with pytest.raises(ValueError, match="prompts is one string: put it into a list"):
        generate(micro_model, micro_tokenizer, "hello", GREEDY)
    with pytest.raises(ValueError, match="max_rows 0: both must be at least 1"):
        generate(micro_model, micro_tokenizer, [[1]], GREEDY, max_rows=0)
    micro_model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        generate(micro_model, micro_tokenizer, [[1]], GREEDY)


def test_a_thought_ends_with_its_budget(micro_model, micro_tokenizer):
    special = micro_tokenizer.special

    def logits(tokens_BT):  # thinks for ever: <think>, then 9 9 9 …; after </think> it says 7
        out = torch.zeros(*tokens_BT.shape, micro_model.config.vocab_size)
        out[..., 9] = 1.0
        out[tokens_BT == special["<|assistant|>"]] = torch.nn.functional.one_hot(torch.tensor(special["<think>"]), out.shape[-1]).float()
        out[(tokens_BT == special["</think>"]) | (tokens_BT == 7)] = torch.nn.functional.one_hot(torch.tensor(7), out.shape[-1]).float()
        return out

    micro_model.hidden = lambda tokens_BT, **_: (logits(tokens_BT), None, None, None)
    micro_model.norm = micro_model.head = torch.nn.Identity()
    sampling = Sampling(temperature=0, repetition=1.0, max_tokens=12, think_budget=4)
    prompts = [[3, special["<|assistant|>"]], [3, 8]]  # the second does not think: no budget applies
    first, second = generate(micro_model, micro_tokenizer, prompts, sampling)
    assert first.ids == [special["<think>"], 9, 9, 9, 9, special["</think>"], 7, 7, 7, 7, 7, 7]
    assert second.ids == [9] * 12


def test_split_thought():
    assert split_thought("<think> 2 + 2 = 4.</think> 4") == ("2 + 2 = 4.", "4")
    assert split_thought(" red ") == ("", "red")
    assert split_thought("<think> 2 + 2 = 4, 4") == ("2 + 2 = 4, 4", "")  # cut short: no answer


def test_chat(micro_model, micro_tokenizer, monkeypatch, capsys):
    """Commands, a thought, Ctrl-C that ends an answer and not the chat, and a talk that outgrows its context."""
    lines, asked = iter(["/help", "/think", "why?", "/nonsense", "go on", "/new", "again", *["more"] * 9]), []

    def typed(_):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    def fake_stream(model, tokenizer, ids, sampling):
        asked.append(tokenizer.decode(ids))
        yield "<think>"
        yield " a\nb</think>"
        yield " because"
        if "go on" in asked[-1]:
            raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr("generate.stream", fake_stream)
    micro_model.config.max_seq_len = 160
    chat(micro_model, micro_tokenizer, GREEDY, thinking=False)
    said = capsys.readouterr().out
    assert "  (thinks) a\n  b\n  because\n" in said and "thinking is on" in said and "/nonsense is no command" in said
    assert said.count(" because [stopped]\n") == 1 and said.count("Ctrl-C") == 2 and "\033" not in said
    assert "why?" in asked[1] and "because" in asked[1] and "why?" not in asked[2] and "a\nb" not in asked[1]
    assert "no longer fit the context of 160 tokens" in said and all(text.endswith("<|assistant|>") for text in asked)
    assert shown("<think> x</think> y", colours=True) == "\033[2m (thinks) x\033[0m\n  y"
    monkeypatch.setattr("builtins.input", lambda _: b"caf\xe9".decode())
    with pytest.raises(ValueError, match="what was typed is not UTF-8"):
        chat(micro_model, micro_tokenizer, GREEDY, thinking=False)
