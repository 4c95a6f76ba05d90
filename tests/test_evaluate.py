"""evaluate.py: likelihoods against whole logits, intervals by hand, resumed answers, needles, and users' task files."""

import dataclasses
import json
import math
import os
import random
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import ROOT

from checkpoint import save_checkpoint
from compass import Compass
from data.needles import line_retrieval, needle
from data.reader import read_tasks
from data.tasks import tasks
from evaluate import (
    Answers,
    accuracy,
    answer_tasks,
    best_of_samples,
    bits_per_byte,
    copied_answers,
    evaluate_stages,
    interval,
    majority_answers,
    multiple_choice,
    retrieval,
    sample_chats,
    score_continuations,
    thinking_switch,
)
from generate import GREEDY, generate, load_for_inference, split_thought, with_room
from report import percent_map, save, table
from tokenizer import Tokenizer

TINY = os.path.join(ROOT, "checkpoints", "tiny")


def test_the_last_stage_is_evaluated_whichever_it_is(micro_config, micro_tokenizer, tmp_path):
    micro_tokenizer.save(tmp_path)
    model = Compass(dataclasses.replace(micro_config, max_seq_len=256))
    for stage in ("anneal", "long", "mtp", "sft1", "drills"):
        path = str(tmp_path / stage / "step_1.pt")
        save_checkpoint(path, model, step=1, stage=stage, tokenizer_hash=micro_tokenizer.hash)
        if stage in ("mtp", "drills"):
            report, _ = evaluate_stages(str(tmp_path), torch.device("cpu"), tasks("test", 0, 1)[:2], [{"text": "a", "lang": "en"}], 1)
            expected = {"mtp": ["long", "mtp"], "drills": ["long", "sft1", "drills", "without text"]}[stage]
            if stage == "mtp":
                with pytest.raises(ValueError, match="--samples 4: mtp answers plain text"):
                    evaluate_stages(str(tmp_path), torch.device("cpu"), tasks("test", 0, 1)[:2], [], 4)
            assert list(report["accuracy"]) == expected and list(report["bits_per_byte"]) == expected[:3]


@pytest.mark.parametrize("base,thinks", [("sft1 01234567, --beta 0.1", False), ("sft2 01234567, --beta 0.1", True), ("", True)])
def test_a_stage_is_asked_to_think_where_its_base_was_taught_to(base, thinks, micro_config, micro_tokenizer, tmp_path, monkeypatch):
    micro_tokenizer.save(tmp_path)
    model = Compass(dataclasses.replace(micro_config, max_seq_len=256))
    save_checkpoint(str(tmp_path / "dpo" / "step_1.pt"), model, step=1, stage="dpo", base=base, tokenizer_hash=micro_tokenizer.hash)
    asked = []
    monkeypatch.setattr("evaluate.answer_tasks", lambda m, t, some, thinking, **_: asked.append(thinking) or [("", "")] * len(some))
    for name in ("retrieval", "thinking_switch", "multiple_choice", "sample_chats"):
        monkeypatch.setattr(f"evaluate.{name}", lambda *args, **kwargs: {})
    evaluate_stages(str(tmp_path), torch.device("cpu"), tasks("test", 0, 1)[:2], [{"text": "a", "lang": "en"}], 1)
    assert asked == [thinks, thinks]  # with and without text


def test_what_is_equal_without_its_text_is_asked_and_counted_once(micro_config, micro_tokenizer, tmp_path, monkeypatch):
    """Two pages, one question: the interval without text is that of a single task."""
    micro_tokenizer.save(tmp_path)
    model = Compass(dataclasses.replace(micro_config, max_seq_len=256))
    save_checkpoint(str(tmp_path / "sft1" / "step_1.pt"), model, step=1, stage="sft1", tokenizer_hash=micro_tokenizer.hash)
    pages = [[{"role": "user", "content": f"{page}\n\ncolour?"}] for page in ("red hat", "blue hat")]
    test = [{**task, "messages": page, "scorer": "exact"} for task, page in zip(tasks("test", 0, 1)[:2], pages, strict=True)]
    asked = []
    monkeypatch.setattr("evaluate.generate", lambda m, t, prompts, *rest: [asked.append(p) or SimpleNamespace(text="x") for p in prompts])
    for name in ("retrieval", "thinking_switch", "multiple_choice", "sample_chats"):
        monkeypatch.setattr(f"evaluate.{name}", lambda *args, **kwargs: {})
    report, _ = evaluate_stages(str(tmp_path), torch.device("cpu"), test, [{"text": "a", "lang": "en"}], 1)
    assert len(asked) == 3
    whole, cut = (report["accuracy"][name]["intervals"]["overall"] for name in ("sft1", "without text"))
    assert cut[1] > whole[1]


def test_continuations_equal_whole_logits_one_by_one(micro_model, micro_tokenizer):
    rng = random.Random(0)
    pairs = [tuple([rng.randrange(500) for _ in range(rng.randint(1, most))] for most in (20, 5)) for _ in range(20)]
    for (prompt, continuation), (logp, greedy) in zip(pairs, score_continuations(micro_model, micro_tokenizer, pairs, rows=6), strict=True):
        with torch.no_grad():
            logits = micro_model(torch.tensor([prompt + continuation]))[0, len(prompt) - 1 : -1, : micro_tokenizer.n_vocab]
        reference = sum(logits.log_softmax(-1)[i, token].item() for i, token in enumerate(continuation))
        assert logp == pytest.approx(reference, abs=1e-4)
        assert greedy == (logits.argmax(-1).tolist() == continuation)


def test_greedy_continuations_are_what_generate_gives(micro_model, micro_tokenizer):
    with torch.no_grad():
        micro_model.head.weight.mul_(4)
    prompts = [[5, 9, 300], [17] * 11]
    given = [completion.ids[:4] for completion in generate(micro_model, micro_tokenizer, prompts, GREEDY)]
    other = [[*ids[:-1], (ids[-1] + 1) % 500] for ids in given]
    scores = score_continuations(micro_model, micro_tokenizer, list(zip(prompts * 2, given + other, strict=True)))
    assert [greedy for _, greedy in scores] == [True, True, False, False]


def test_multiple_choice_raw_and_per_byte(micro_model, micro_tokenizer, monkeypatch):
    task = {"task": "t", "messages": [{"role": "user", "content": "?"}], "answer": "a long choice", "choices": ["no", "a long choice"]}
    # -4 / 2 bytes is worse than -13 / 13 bytes: the sum prefers "no", the mean per byte the long one
    scored = []
    monkeypatch.setattr("evaluate.score_continuations", lambda m, t, pairs: scored.extend(pairs) or [(-4.0, False), (-13.0, False)])
    assert multiple_choice(micro_model, micro_tokenizer, [task, {"task": "free"}]) == {"t": (0.0, 1.0, 1)}
    for choice, (prompt, continuation) in zip(task["choices"], scored, strict=True):  # the texts that answers are trained as
        assert prompt + continuation == micro_tokenizer.encode_chat([*task["messages"], {"role": "assistant", "content": choice}])[0]
    with pytest.raises(ValueError, match=r"task mine-3: \d+ tokens with its longest choice, the context has 64"):
        multiple_choice(micro_model, micro_tokenizer, [task, {**task, "id": "mine-3", "choices": ["no", "word " * 64]}])


def test_bits_per_byte_by_hand(micro_model, micro_tokenizer):
    """Pieces of a context of 64, a token at a time; the first token of a piece is given, so neither its bits nor its bytes count."""
    documents = [{"text": "Velora A1 shirt, red. " * n, "lang": lang} for n, lang in ((1, "en"), (9, "en"), (2, "th"))]
    bits, count = {"en": 0.0, "th": 0.0}, {"en": 0, "th": 0}
    for document in documents:
        ids = micro_tokenizer.encode(document["text"])
        for piece in (ids[i : i + 64] for i in range(0, len(ids), 64)):
            with torch.no_grad():
                logp_TV = micro_model(torch.tensor([piece]))[0].log_softmax(-1)
            for t, token in enumerate(piece[1:]):
                bits[document["lang"]] -= logp_TV[t, token].item() / math.log(2)
                count[document["lang"]] += len(micro_tokenizer.encoding.decode_single_token_bytes(token))
    expected = {lang: bits[lang] / count[lang] for lang in bits}
    assert bits_per_byte(micro_model, micro_tokenizer, documents, rows=2) == pytest.approx(expected, rel=1e-4)


def a_task(answer, question="?", **more):
    return {"task": "t", "lang": "en", "answer": answer, "scorer": "exact", "messages": [{"role": "user", "content": question}], **more}


def test_baselines_and_the_thinking_switch_by_hand():
    assert majority_answers([a_task("x"), a_task("y")], [a_task(answer) for answer in "abb"]) == ["b", "b"]
    assert majority_answers([a_task("x", lang="th")], [a_task("a")]) == [""]
    # after the longest word that question and text share
    assert copied_answers([a_task("red", "The Colour red. Stock 3.\n\nWhich Colour has the shirt?")]) == ["red."]
    switch = thinking_switch([a_task("7", think="3 + 4"), a_task("8")], lambda _, thinking: [("3 + 4", "7") if thinking else ("", "8")])
    assert switch["on"] == {"accuracy": {"t": 1.0}, "with_thought": 1.0, "characters": 6.0}
    assert switch["off"] == {"accuracy": {"t": 0.0}, "with_thought": 0.0, "characters": 1.0}


def test_interval_by_hand():
    # Wilson for 8 of 10 at z = 1.96: centre (0.8 + 0.19208) / 1.38416, half width 1.96 sqrt(0.016 + 0.0096) / 1.38416
    assert interval(8, 10) == pytest.approx([0.4902, 0.9433], abs=1e-3)
    low, high = interval(0, 40)
    assert low == pytest.approx(0, abs=1e-9) and 0.05 < high < 0.12
    # a task may bear the name of a group, or of the row of all
    named = [{"task": name, "lang": "en", "scorer": "exact", "answer": "a", "messages": name} for name in ("general", "overall")]
    result = accuracy(named, ["a", "b"])
    assert result["intervals"]["by_task"] == {"general": interval(1, 1), "overall": interval(0, 1)}
    assert result["intervals"]["by_group"] == {"general": interval(1, 2)} and result["intervals"]["overall"] == interval(1, 2)


def test_chats_of_the_first_languages():
    made = [{**task, "messages": [{"role": "user", "content": task["lang"]}]} for task in tasks("test", 0, 2)]
    text = sample_chats(made, lambda asked, thinking: [("so", "7") if thinking else ("", "7")])
    assert [line.removeprefix("user: ") for line in text.split("\n") if line.startswith("user")] == ["en", "zh", "id"]
    assert text.count("thinking on: <think>so</think> 7") == text.count("thinking off: 7") == 3


def test_answers_survive_a_kill(micro_model, micro_tokenizer, tmp_path, monkeypatch):
    test, path = [task for task in tasks("test", 0, 1) if task["task"] == "mathematics"], str(tmp_path / "answers.jsonl")
    micro_model.config.max_seq_len = 512
    first = answer_tasks(micro_model, micro_tokenizer, test, kept=Answers(path, "one"))
    with open(path, "rb+") as file:  # the last answer is torn
        file.seek(-5, 2)
        file.truncate()
        file.seek(0, 2)
        file.write(b"\n3\n")  # JSON, but no answer
    asked = []

    def watched(model, tokenizer, prompts, sampling):
        asked.extend(prompts)
        return generate(model, tokenizer, prompts, sampling)

    monkeypatch.setattr("evaluate.generate", watched)
    assert answer_tasks(micro_model, micro_tokenizer, test, kept=Answers(path, "one")) == first and len(asked) == 1
    assert answer_tasks(micro_model, micro_tokenizer, test, kept=Answers(path, "one")) == first and len(asked) == 1
    answer_tasks(micro_model, micro_tokenizer, test, kept=Answers(path, "another checkpoint"))
    assert len(asked) == 1 + len(test)
    longer = [{**test[0], "answer": "so " * 300}, *test[1:]]  # has more room: what was answered in less is not taken for it
    answer_tasks(micro_model, micro_tokenizer, longer, kept=Answers(path, "one"))
    assert len(asked) == 1 + 2 * len(test)


def test_the_shipped_checkpoint_answers_as_the_readme_shows():
    model, tokenizer = load_for_inference(TINY, "cpu")
    page = "Lumika E6 chair\nIt costs $76. Colour blue, made of nylon. Ships from Cebu. Stock: 9.\n\nHow much do 4 of them cost?"
    chats = [tokenizer.encode_chat([{"role": "user", "content": text}], thinking=True)[0] for text in ("What is 27 + 45?", page)]
    assert [split_thought(made.text) for made in generate(model, tokenizer, chats, GREEDY)] == [
        ("7 + 5 = 12, 20 + 40 = 60, 60 + 12 = 72.", "72"),
        ("One piece costs $76. 70 × 4 = 280, 6 × 4 = 24, 280 + 24 = 304.", "$304"),
    ]


def test_long_references_have_room(micro_tokenizer):
    short, long = {"answer": "7"}, {"answer": "7", "think": "so " * 300}
    assert with_room(GREEDY, micro_tokenizer, [short]) == GREEDY == with_room(GREEDY, micro_tokenizer, [])
    assert with_room(GREEDY, micro_tokenizer, [short, long]).max_tokens > len(micro_tokenizer.encode(long["think"]))
    assert with_room(GREEDY, Tokenizer.load(TINY), tasks("test", 0, 1)) == GREEDY


def test_equal_prompts_count_once_in_intervals():
    def task(content):
        return {"task": "t", "lang": "en", "messages": [{"role": "user", "content": content}], "answer": "7", "scorer": "number"}

    apart = accuracy([task(str(i)) for i in range(8)], ["7", "6"] * 4)
    alike = accuracy([task(str(i // 2)) for i in range(8)], ["7", "7", "6", "6"] * 2)
    assert apart["overall"] == alike["overall"] == 0.5 and apart["intervals"]["overall"] == interval(4, 8)
    assert alike["intervals"]["overall"] == alike["intervals"]["by_language"]["en"] == interval(2, 4)


def test_needles_have_the_length_and_hold_the_answer_once(micro_tokenizer):
    rng = random.Random(0)
    for lang in ("en", "th"):
        places = []
        for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
            prompt, answer = needle(micro_tokenizer, lang, random.Random(0), 300, depth)
            name = prompt.rpartition("\n\n")[2]
            assert prompt.count(name) == 2
            places.append(prompt.index(name) / len(prompt))
            assert prompt[prompt.index(name) + len(name) :].startswith(answer)
            assert 280 <= len(micro_tokenizer.encode(prompt + answer)) <= 310
        assert places == sorted(places) and places[0] == 0 and places[-1] > 0.8 and len(set(places)) >= 4  # between whole pages
        prompt, answer = line_retrieval(micro_tokenizer, lang, rng, 300)
        name = prompt.rpartition("\n\n")[2]
        assert prompt.count(name + answer) == 1 and len(micro_tokenizer.encode(prompt + answer)) <= 310


def test_retrieval_counts_what_is_found(micro_model, micro_tokenizer, monkeypatch):
    assert retrieval(micro_model, micro_tokenizer, (64,), n=2)["needles"] == [[0.0] * 5]
    # two lengths of six cells with two needles each: the first length finds its first cell, the second its lines and half of its last depth
    found = [i in (0, 1, 20, 22, 23) for i in range(24)]
    asked = []
    monkeypatch.setattr("evaluate.score_continuations", lambda *args: asked.append(args[2]) or [(0.0, hit) for hit in found])
    for chat in (False, True):
        result = retrieval(micro_model, micro_tokenizer, (64, 128), n=2, chat=chat)
        assert (result["needles"], result["lines"]) == ([[1.0, 0, 0, 0, 0], [0, 0, 0, 0, 0.5]], [0.0, 1.0])
    for (plain, answer), (chat, same) in zip(*asked, strict=True):
        assert answer == same and chat[-1] == micro_tokenizer.special["<|assistant|>"]
        assert micro_tokenizer.decode(plain) in micro_tokenizer.decode(chat)


def test_samples(micro_model, micro_tokenizer, monkeypatch):
    from generate import Completion

    test = [{"task": "t", "messages": [{"role": "user", "content": "?"}], "answer": "7", "scorer": "number"}] * 2
    test[0] = {**test[0], "think": "6 + 1"}
    texts = ["7", "7", "8", "<think>6 + 1</think> 7", "8", "8", "9", "8"]
    asked = []
    monkeypatch.setattr("evaluate.generate", lambda *given: asked.append(given) or [Completion(text, [], [], True) for text in texts])
    for thinking in (True, False):
        found = best_of_samples(micro_model, micro_tokenizer, test, 4, thinking, 7)
        assert found == {"mean@1": 0.375, "majority@4": 0.5, "pass@4": 0.5}
    prompts, seeds = zip(*[(given[2], given[3].seed) for given in asked], strict=True)
    assert seeds == (7, 7) and len(prompts[0][0]) > len(prompts[1][0]) == len(prompts[0][1])  # the think prompt, where there is a thought


def test_a_task_longer_than_the_context_is_named(micro_model, micro_tokenizer):
    task = {"id": "mine-3", "messages": [{"role": "user", "content": "word " * 64}], "answer": "a", "scorer": "exact"}
    with pytest.raises(ValueError, match=r"task mine-3: \d+ tokens leave no room for an answer in 64"):
        answer_tasks(micro_model, micro_tokenizer, [task])


def test_every_fault_of_a_task_file_has_its_line(tmp_path):
    good = {"id": "a", "messages": [{"role": "user", "content": "q"}], "answer": "yes"}
    lines = [
        good, "{", [1], {"answer": "x"}, {**good, "id": "b", "answer": ""}, {**good, "id": "c", "scorer": "guess"}, {**good}, "",
        {**good, "id": "d", "messages": [{"role": "buyer", "content": "q"}]}, {**good, "id": "e", "choices": ["no"]},
        {**good, "id": "f", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, {**good, "id": 3},
        {**good, "id": "g", "think": 3}, {**good, "id": "h", "answer": "twelve", "scorer": "number"}, {**good, "id": "i", "answer": "?!"},
        {**good, "id": "j", "choices": ["no", "yes", "yes"]}, '{"messages": [{"role": "user", "content": "\\ud83d"}], "answer": "x"}',
        {**good, "id": "k", "messages": [{"role": "user", "content": " "}]}, {**good, "id": "l", "answer": "<think>1 + 1</think>2"},
    ]  # fmt: skip
    path = tmp_path / "mine.jsonl"
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_bytes(text.encode() + b'\n{"answer": "\xff"}')
    with pytest.raises(ValueError) as error:
        read_tasks(str(path))
    found = [line.removeprefix(f"{path}:") for line in str(error.value).split("\n")]
    expected = {
        2: "malformed JSON", 3: "expected a JSON object", 4: 'field "messages"', 5: 'field "answer"', 6: "unknown scorer 'guess'",
        7: "id 'a' is also the id of line 1", 9: "a message needs a role", 10: 'field "choices"', 11: "the last message", 12: 'field "id"',
        13: 'field "think"', 14: "scorer 'number' cannot judge the answer 'twelve'", 15: "scorer 'exact' cannot judge",
        16: "a choice twice", 17: "malformed JSON", 18: "a message needs a role", 19: 'field "answer" holds a thought',
        20: "malformed JSON (not UTF-8 at byte 13",
    }  # fmt: skip
    assert [int(line.split(":")[0]) for line in found] == list(expected)
    assert all(message in line for line, message in zip(found, expected.values(), strict=True))


def test_a_price_in_a_name_is_no_formula(tmp_path):
    figure, axis = plt.subplots()
    percent_map(axis, np.ones((1, 1)), ["$%^$"], ["$5 or $10"])
    save(figure, str(tmp_path / "map.png"))
    assert (tmp_path / "map.png").stat().st_size > 1000
    assert plt.rcParams["text.parse_math"]  # the powers of ten on a logarithmic axis are formulas


def test_a_bar_in_a_name_stays_inside_its_cell():
    row = table([["a|b\nc", 1]], ["task", "n"]).splitlines()[-1]
    assert row == r"| a\|b c | 1 |"
