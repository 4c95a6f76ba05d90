"""sft.py: packing against trl and a bound, masks, curriculum, bad task files."""

import argparse
import copy
import dataclasses
import json
import math
import os
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from compass import CONFIGS
from data import general as data_general
from data.preferences import preferences
from data.tasks import AFTER_DRILLS, FIRST, LATER, tasks, training
from parallel import Layout, Ranks, parallelize
from reward import Pairs, encode_pairs
from sft import CAPACITY, FULL, ROWS, Chats, collate, curriculum, decontaminated, length_buckets, pack, pass_rates, sft_loss
from train import Schedule, _train_step, for_width, make_optimizer


def distributions():
    rng = random.Random(0)
    yield "short", [rng.randint(8, 60) for _ in range(3000)]
    yield "mixed", [min(512, int(rng.lognormvariate(4.5, 0.9)) + 4) for _ in range(3000)]
    yield "thoughts", [rng.randint(200, 512) for _ in range(1500)] + [rng.randint(10, 100) for _ in range(1500)]


@pytest.mark.parametrize("name,lengths", distributions())
def test_bins_are_a_partition_and_near_the_bound(name, lengths):
    bins = pack(lengths, 512)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in members) <= 512 for members in bins)
    bound = max(-(-sum(lengths) // 512), sum(length > 256 for length in lengths))
    assert len(bins) <= 1.01 * bound + 1


@pytest.mark.parametrize("name,lengths", distributions())
def test_never_more_bins_than_trl(name, lengths):
    from datasets import Dataset
    from trl.data_utils import pack_dataset

    theirs = pack_dataset(Dataset.from_dict({"input_ids": [[0] * n for n in lengths]}), 512, strategy="bfd")
    assert len(pack(lengths, 512)) <= len(theirs)


def test_best_fit_by_hand():
    # 6 opens a bin, 5 a second, 4 fits the first exactly, 3 goes to the second (fuller is better), 2 fills it
    assert pack([2, 3, 4, 5, 6], 10) == [[4, 2], [3, 1, 0]]
    assert pack([], 10) == []
    for capacity in (1, 7, 8, 9):
        assert len(pack([capacity] * 3, capacity)) == 3


@pytest.mark.parametrize("lengths,index", [([3, 11], 1), ([0, 4], 0)])
def test_a_sample_that_cannot_fit_is_named(lengths, index):
    with pytest.raises(ValueError, match=f"sample {index} "):
        pack(lengths, 10)


def test_collate_by_hand():
    samples = [([5, 6, 7], [0, 1, 1]), ([8, 9], [0, 1])]
    tokens, targets, weights, doc_ids, positions = collate(samples, [[0, 1]], 6)
    assert tokens.tolist() == [[5, 6, 7, 8, 9, 0]]
    assert doc_ids.tolist() == [[0, 0, 0, 1, 1, -1]] and positions.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert weights.tolist() == [[1, 1, 0, 1, 0, 0]]
    assert [t for t, w in zip(targets[0].tolist(), weights[0].tolist(), strict=True) if w] == [6, 7, 9]


def test_curriculum_switches_thinking_with_the_stage():
    examples = tasks("train", 0, 3)
    assert not any(thinking or "think" in task for task, thinking in curriculum("sft1", examples, 0))
    second = curriculum("sft2", examples, 0)
    reasoning = [task for task in examples if "think" in task]
    thoughtful = {"numerical_reasoning", "mathematics", "reasoning", "platform", "matching", "similarity", "recommendation", "questioning"}
    assert {t["task"] for t, thinking in second if thinking} == {*thoughtful, "retrieval"}
    assert [t for t, thinking in second if thinking] == reasoning
    assert sum(not thinking for _, thinking in second) == 2 * len(reasoning)
    assert curriculum("drills", examples, 0) == [(task, "think" in task) for task in examples]


def test_tasks_without_any_thought_are_tuned_in_both_stages():
    direct = [task for task in tasks("train", 0, 1) if "think" not in task]
    for stage in ("sft1", "sft2"):
        assert sorted(task["id"] for task, _ in curriculum(stage, direct, 0)) == sorted(task["id"] for task in direct)


def test_sft1_says_what_it_leaves_to_sft2(capsys):
    reasoning = [task for task in tasks("train", 0, 1) if "think" in task]
    curriculum("sft1", tasks("train", 0, 1), 0)
    assert f"{len(reasoning)} of 184 tasks have a thought" in capsys.readouterr().out
    with pytest.raises(ValueError, match="without a thought"):
        curriculum("sft1", reasoning, 0)


def test_over_long_samples_are_reported(micro_tokenizer, capsys):
    examples = [(task, False) for task in tasks("train", 0, 1)]
    long = {"id": "the-long-one", "messages": [{"role": "user", "content": "word " * 900}], "answer": "no"}
    packed = Chats([*examples, (long, False)], micro_tokenizer, 512, 0)
    assert "the-long-one has" in capsys.readouterr().out and len(packed.samples) == len(examples)
    a, b = packed.batch(1)[0], packed.batch(1)[0]
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_step_has_about_the_same_tokens_whatever_the_longest_conversation(micro_tokenizer):
    examples = [(task, False) for task in tasks("train", 0, 2)]
    long = {"id": "long", "messages": [{"role": "user", "content": "word " * 300}], "answer": "no"}
    short, wide = Chats(examples, micro_tokenizer, 4096, 0), Chats([*examples, (long, False)], micro_tokenizer, 4096, 0)
    assert wide.capacity > 2 * short.capacity
    for chats in (short, wide):
        assert 0.6 * CAPACITY * ROWS < chats.batch(0)[0]["tokens"].numel() <= max(1.5 * CAPACITY * ROWS, chats.capacity)


def test_a_row_wider_than_its_batch_is_named():
    with pytest.raises(ValueError, match="row 1 of a batch holds more than its 256 tokens"):
        collate([([1] * 200, [1] * 200), ([1] * 300, [1] * 300)], [[0], [1]])


def test_length_buckets_hold_everything_once_and_waste_little():
    for _, lengths in distributions():
        batches = length_buckets(lengths, 2048, random.Random(0))
        assert sorted(i for members in batches for i in members) == list(range(len(lengths)))
        places = [len(members) * max(lengths[i] for i in members) for members in batches]
        assert max(places) <= 2048 and sum(lengths) / sum(places) > 0.97


def test_many_ranks_have_a_row_each_in_every_step(micro_tokenizer):
    rng = random.Random(0)
    lengths = [rng.randint(40, 200) for _ in range(500)] + [900] * 3
    batches = length_buckets(lengths, 1536, rng, least=4)
    assert sorted(i for members in batches for i in members) == list(range(len(lengths))) and min(map(len, batches)) >= 4
    longest = [4000, 4001, 4002]  # what is left over takes one more row from the batch before, which stays narrow
    batches = length_buckets([rng.randint(15, 24) for _ in range(4000)] + longest, 1536, rng, least=4)
    assert sorted(map(len, batches))[0] == 4 and max(len(batch) for batch in batches if {4000, 4001, 4002} & set(batch)) == 4
    examples = [(task, False) for task in tasks("train", 0, 2)]
    for ranks, stages, rows in ((1, 1, 5), (4, 1, 5), (16, 1, 16), (1, 2, 6), (1, 4, 8), (4, 2, 8), (16, 2, 32)):
        assert len(Chats(examples, micro_tokenizer, 1024, 0, ranks=ranks, stages=stages).batch(0)[0]["tokens"]) == rows
    pairs = Pairs(*encode_pairs(preferences("train", 0, 3), micro_tokenizer), 1024, 0, ranks=16)
    assert len(pairs.batch(0)[0]["weights"]) == 16


def test_rates_fall_with_the_width(micro_config):
    schedule = Schedule(10, 2e-3, 1e-4)
    assert for_width(schedule, micro_config) == for_width(schedule, CONFIGS["tiny"]) == schedule
    wide = for_width(schedule, CONFIGS["v2_30b"])
    assert wide.peak == pytest.approx(2e-3 * 128 / 3072) and wide.final == pytest.approx(1e-4 * 128 / 3072)


def test_padded_batches_are_as_wide_as_their_longest(micro_tokenizer, capsys):
    chats = Chats([(task, False) for task in tasks("train", 0, 2)], micro_tokenizer, 1024, 0, packed=False)
    seen = places = 0
    for step in range(len(chats.units)):
        (batch,) = chats.batch(step)
        valid = batch["doc_ids"] >= 0
        places += valid.numel()
        longest = valid.sum(1).max().item()
        assert batch["tokens"].shape[1] == -(-longest // 8) * 8 and valid.numel() <= CAPACITY * ROWS + 8 * len(valid)
        seen += int(valid.sum())
    assert seen == sum(len(ids) for ids, _ in chats.samples)
    assert f"{100 * seen / places:.1f} % filled" in capsys.readouterr().out


def test_mixed_loss_trains_on_whole_conversations_of_its_domain(micro_tokenizer):
    examples = [(task, False) for task in tasks("train", 0, 1) + training(0, 20, FIRST, 4)]
    answers, mixed = (Chats(examples, micro_tokenizer, 1024, 0, full=FULL[name]) for name in ("none", "e-commerce"))
    for (task, _), (ids, mask), (_, mixed_mask), domain in zip(examples, answers.samples, mixed.samples, mixed.domains, strict=True):
        full, mask, mixed_mask = [0] + [1] * (len(ids) - 1), mask.tolist(), mixed_mask.tolist()
        assert domain == (task["task"] in data_general.TASKS or task["task"] in ("mathematics", "echo"))
        assert mixed_mask == (full if domain == 0 else mask) and mask != full


def test_a_domain_without_conversations_is_named(micro_tokenizer):
    mine = [({"task": "mine", "messages": [{"role": "user", "content": "a"}], "answer": "b"}, False)]
    with pytest.raises(ValueError, match="no conversation is of the domain e-commerce"):
        Chats(mine, micro_tokenizer, 64, 0, full=FULL["e-commerce"])
    [(_, mask)] = Chats(mine, micro_tokenizer, 64, 0, full=FULL["all"]).samples  # whatever there is
    assert mask[1:].all()


def test_domains_add_up_to_the_loss(micro_model, micro_tokenizer):
    chats = Chats([(task, False) for task in tasks("train", 0, 1)], micro_tokenizer, 1024, 0)
    (batch,) = chats.batch(0)
    loss, metrics = sft_loss(micro_model, batch)
    assert (metrics["lm_e-commerce"] + metrics["lm_general"]).item() == pytest.approx(metrics["lm"].item(), rel=1e-5)
    assert (metrics["share_e-commerce"] + metrics["share_general"]).item() == pytest.approx(1, rel=1e-5)
    general = {**batch, "weights": batch["weights"] * (batch["domains"] == 1)}
    alone = metrics["lm_general"] / metrics["share_general"]
    assert sft_loss(micro_model, general)[1]["lm"].item() == pytest.approx(alone.item(), rel=1e-5)


def rank_step(rank, folder, models, batch):
    """One of two gloo ranks: a step on its rows; what came out goes to a file."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = parallelize(models[rank], Ranks(Layout(dp=2), "cpu"))
    rows = [model.ranks.take(batch)]
    loss, norm, _, metrics = _train_step(model, make_optimizer(model), rows, sft_loss, 1e-3, torch.device("cpu"))
    whole = {name: p.full_tensor() for name, p in model.state_dict().items()}
    torch.save((loss, norm, metrics["lm_general"], whole), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_equal_one_batch(micro_model, micro_tokenizer, tmp_path):
    chats = Chats([(task, False) for task in tasks("train", 0, 1)], micro_tokenizer, 1024, 0)
    (whole,) = chats.batch(0)
    torch.multiprocessing.spawn(rank_step, (str(tmp_path), [copy.deepcopy(micro_model) for _ in range(2)], whole), nprocs=2)
    loss, norm, _, metrics = _train_step(micro_model, make_optimizer(micro_model), [whole], sft_loss, 1e-3, torch.device("cpu"))
    for rank in range(2):
        their_loss, their_norm, general, weights = torch.load(tmp_path / f"{rank}.pt")
        assert their_loss == pytest.approx(loss, rel=1e-6) and their_norm == pytest.approx(norm, rel=1e-4)
        assert general == pytest.approx(metrics["lm_general"], rel=1e-5)
        for name, value in micro_model.state_dict().items():
            torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=2e-5, msg=name)


def test_pass_rates_and_the_window(micro_model, micro_tokenizer, monkeypatch, tmp_path, capsys):
    from types import SimpleNamespace

    from generate import Completion
    from sft import selected_thoughts

    reasoning = [task for task in tasks("train", 1, 1) if task["task"] == "mathematics"][:3]
    never, now_and_then, always = (task["answer"] for task in reasoning)
    texts = ["0"] * 8 + [f"<think>so</think> {now_and_then}"] * 3 + ["0"] * 5 + [always] * 8
    calls = []
    monkeypatch.setattr("sft.generate", lambda *given: calls.append(given) or [Completion(text, [], [], True) for text in texts])
    micro_model.config = dataclasses.replace(micro_model.config, max_seq_len=100)
    endless = {**reasoning[0], "messages": [{"role": "user", "content": "1 + 1" * 100}]}
    assert pass_rates(micro_model, micro_tokenizer, [reasoning[0], endless, *reasoning[1:]]) == [0.0, 0.0, 0.375, 1.0]
    _, _, prompts, _, n = calls[0]
    assert prompts == [micro_tokenizer.encode_chat(task["messages"], thinking=True)[0] for task in reasoning] and n == 8
    assert "1 prompts leave no room for an answer in a context of 100" in capsys.readouterr().out
    monkeypatch.setattr("sft.load_for_inference", lambda *_: (micro_model, micro_tokenizer))
    direct = [{"messages": [{"role": "user", "content": "q"}], "answer": "a"}]
    kept = selected_thoughts("sft2", direct + reasoning, SimpleNamespace(rollouts="a run", seed=0), "cpu")
    assert kept == [*direct, reasoning[1]] and "1 of 3 reasoning tasks too hard, 1 too easy" in capsys.readouterr().out


@pytest.mark.parametrize("before,expected", [("sft1", (LATER, None)), ("drills", (AFTER_DRILLS, math.inf))])
def test_what_sft2_hears_depends_on_drills(before, expected, monkeypatch, tmp_path):
    """After drills the mixture and all phrasings of a long training, three tasks a language and step."""
    import sft

    monkeypatch.setattr(sft, "stage_before", lambda *_: before)
    monkeypatch.setattr(sft, "load_latest", lambda *_, **__: {"origin": ""})
    monkeypatch.setattr(sft, "inherit", lambda *_, **__: None)
    asked = []
    monkeypatch.setattr(sft, "training", lambda *given: asked.append(given) or [])
    with pytest.raises(ValueError, match="no task is left"):
        sft.run_stage("sft2", argparse.Namespace(run=str(tmp_path), data=None, steps=40, seed=7, resume=False, rollouts=None), "cpu", None)
    assert asked == [(7, 120, *expected)]


def test_the_flags_reach_the_training(monkeypatch, tmp_path, micro_tokenizer):
    """--full and --batching, and rates that fall with the width of the model."""
    import sft

    wide, fitted = dataclasses.replace(CONFIGS["tiny"], dim=256), []
    monkeypatch.setattr(sft, "load_latest", lambda *_, **__: {"origin": ""})
    monkeypatch.setattr(sft, "inherit", lambda *_, **__: None)
    monkeypatch.setattr(sft, "model_from", lambda *_: SimpleNamespace(config=wide, ranks=SimpleNamespace(count=1)))
    monkeypatch.setattr(sft, "fit_stage", lambda model, batch, loss, schedule, *_: fitted.append((batch(0)[0], schedule.peak)))
    (tmp_path / "t.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "q"}], "answer": "a", "task": "page"}))
    for full, batching in (("none", "packed"), ("e-commerce", "padded")):
        given = dict(data=str(tmp_path / "t.jsonl"), steps=4, seed=0, resume=False, rollouts=None, full=full, batching=batching)
        sft.run_stage("sft1", argparse.Namespace(run=str(tmp_path / "run"), **given), "cpu", micro_tokenizer)
    (packed, peak), (padded, _) = fitted
    ids, mask = micro_tokenizer.encode_chat([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])
    assert peak == sft.STAGES["sft1"][1].peak / 2
    assert packed["tokens"].shape[1] == CAPACITY and packed["weights"][0].sum() == sum(mask)
    assert padded["tokens"].shape[1] < 20 and padded["weights"].sum() == len(ids) - 1


def test_near_copies_of_test_tasks_are_left_out():
    test = tasks("test", 0, 1)
    train = [task for task in tasks("train", 0, 1) if "think" in task]
    planted = {**test[0], "messages": [{"role": "user", "content": test[0]["messages"][0]["content"].upper() + " !"}]}
    assert decontaminated([*train, planted], test) == train


@pytest.mark.parametrize("stage", ["drills", "sft2"])
def test_nothing_but_near_copies_is_said(stage, script, tmp_path):
    shutil.copytree(os.path.join(ROOT, "checkpoints", "tiny"), tmp_path / "run")
    os.rename(tmp_path / "run" / "sft2", tmp_path / "run" / "sft1")
    copy = next(task for task in tasks("test", 0, 1) if "think" in task)
    (tmp_path / "tasks.jsonl").write_text(json.dumps(copy))
    result = script("sft.py", "--run", tmp_path / "run", "--stage", stage, "--data", tmp_path / "tasks.jsonl", "--steps", "1")
    assert result.returncode == 2 and result.stderr == f"sft.py: error: {stage}: no task is left to train on\n", result.stderr
