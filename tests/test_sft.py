"""sft.py: packing against trl and a bound, masks, curriculum, bad task files."""

import json
import random

import pytest
import torch

from data.tasks import tasks
from sft import PackedChats, collate, curriculum, pack


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
    assert {t["task"] for t, thinking in second if thinking} == {"numerical_reasoning", "mathematics", "reasoning", "platform"}
    assert [t for t, thinking in second if thinking] == reasoning
    assert sum(not thinking for _, thinking in second) == 2 * len(reasoning)


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
    packed = PackedChats([*examples, (long, False)], micro_tokenizer, 512, 0)
    assert "the-long-one has" in capsys.readouterr().out and len(packed.samples) == len(examples)
    a, b = packed.batch(1)[0], packed.batch(1)[0]
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "line,message",
    [
        ('{"messages": [', "tasks.jsonl:2: malformed JSON"),
        ('{"answer": "x"}', 'tasks.jsonl:2: field "messages"'),
        ('{"messages": [{"role": "user", "content": "q"}], "answer": ""}', 'tasks.jsonl:2: field "answer"'),
        ('{"messages": [{"role": "buyer", "content": "q"}], "answer": "a"}', "tasks.jsonl:2: a message needs a role"),
        ('{"messages": [{"role": "user", "content": "q"}], "answer": "a", "think": 3}', 'tasks.jsonl:2: field "think"'),
    ],
)
def test_bad_task_files_name_the_line(tmp_path, line, message):
    from sft import read_tasks

    good = {"messages": [{"role": "user", "content": "q"}], "answer": "a"}
    (tmp_path / "tasks.jsonl").write_text(json.dumps(good) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message.replace("[", "\\[")):
        read_tasks(str(tmp_path / "tasks.jsonl"))
