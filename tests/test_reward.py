"""reward.py: the loss in closed form, averages of weights, Best-of-N against drawing subsets."""

import copy
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch

from checkpoint import save_checkpoint
from data.preferences import preferences
from data.reader import read_pairs
from reward import (
    Pairs,
    RewardModel,
    average_members,
    average_weights,
    best_of_n,
    bradley_terry_loss,
    encode_pairs,
    load_reward_model,
    pair_accuracy,
    reward_loss,
    rewards,
)
from train import _train_step, first_row, make_optimizer


def test_bradley_terry_by_hand():
    chosen, rejected = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0])
    assert bradley_terry_loss(chosen, rejected).item() == pytest.approx((math.log1p(math.exp(-1)) + math.log(2)) / 2)
    assert bradley_terry_loss(chosen + 5, rejected + 5).item() == bradley_terry_loss(chosen, rejected).item()


def test_the_four_members(monkeypatch):
    """Two of one epoch, two of two, at two rates and with two shapes, all from the same head; epochs of 20 pairs in steps of 8."""
    import reward

    rows, fitted = SimpleNamespace(rows=range(20), per_step=8, batch=None), []
    state = {"config": {"max_seq_len": 64}, "stage": "sft2", "origin": "sft2"}
    for name, stand_in in {
        "processes_with_whole_rows": lambda args: (torch.device("cpu"), None, None, state), "load_pairs": lambda *_: rows,
        "model_from": lambda *_: None, "RewardModel": lambda *_: torch.nn.Identity(), "encode_pairs": lambda *_: (),
        "Pairs": lambda *_: rows, "for_width": lambda schedule, config: schedule, "average_members": lambda *_: None,
        "load_reward_model": lambda *_: (None, None), "pair_accuracy": lambda *_: 0.5,
        "fit_stage": lambda model, batch, loss, schedule, stage, *_: fitted.append((stage, schedule)),
    }.items():  # fmt: skip
        monkeypatch.setattr(reward, name, stand_in)
    monkeypatch.setattr(torch.nn.Identity, "config", None, raising=False)
    monkeypatch.setattr("sys.argv", ["reward.py", "--run", "nowhere"])
    reward.main()
    assert {s.base for _, s in fitted} == {"sft2"}
    assert [(stage, s.steps, s.peak, s.shape) for stage, s in fitted] == [
        ("reward/1", 3, 3e-4, "cosine"), ("reward/2", 3, 1e-4, "linear"), ("reward/3", 6, 3e-4, "linear"), ("reward/4", 6, 1e-4, "cosine"),
    ]  # fmt: skip


def test_members_of_other_pairs_are_not_averaged(micro_model, tmp_path, monkeypatch):
    """A first member that finished on one file of pairs, and reward.py --resume with another."""
    import reward

    batch = {"tokens": torch.ones(2, 4, dtype=torch.long), "weights": torch.ones(2, 4), "doc_ids": torch.zeros(2, 4, dtype=torch.long)}
    path, known = str(tmp_path / "reward" / "1" / "step_2.pt"), dict(step=2, planned=2, stage="reward/1", base="sft2", seed=0)
    state = {"config": {"max_seq_len": 64}, "stage": "sft2", "origin": "sft2"}
    pairs, trained = SimpleNamespace(rows=range(8), per_step=8, batch=lambda step: [batch]), []
    for name, stand_in in {
        "processes_with_whole_rows": lambda args: (torch.device("cpu"), None, None, state), "load_pairs": lambda *_: pairs,
        "encode_pairs": lambda *_: (), "Pairs": lambda *_: pairs, "model_from": lambda *_: trained.append(1) or 1 / 0,
    }.items():  # fmt: skip
        monkeypatch.setattr(reward, name, stand_in)
    monkeypatch.setattr("sys.argv", ["reward.py", "--run", str(tmp_path), "--steps", "2", "--resume"])
    save_checkpoint(path, RewardModel(micro_model), **known, data=first_row(batch) + 1)
    with pytest.raises(ValueError, match="reward/1 was trained on other pairs"):
        reward.main()
    save_checkpoint(path, RewardModel(micro_model), **known, data=first_row(batch))
    with pytest.raises(ZeroDivisionError):  # of these pairs: on to the second member
        reward.main()
    assert trained == [1]


def test_average_of_weights():
    states = [{"w": torch.full((2,), float(i)), "n": torch.tensor([i, i])} for i in (1, 2, 6)]
    mean = average_weights(states)
    assert mean["w"].tolist() == [3.0, 3.0] and mean["n"].tolist() == [3, 3] and mean["n"].dtype == torch.int64
    with pytest.raises(ValueError, match="differ in v"):
        average_weights([states[0], {**states[1], "v": torch.ones(1)}])
    with pytest.raises(ValueError, match="differ in w"):
        average_weights([states[0], {**states[1], "w": torch.ones(3)}])


def test_best_of_n_equals_all_subsets():
    g = torch.Generator().manual_seed(0)
    rewards, correct = torch.rand(4, 8, generator=g), (torch.rand(4, 8, generator=g) > 0.6).float()
    assert list(best_of_n(rewards[:, :6], correct[:, :6])) == [1, 2, 4, 6]
    result = best_of_n(rewards, correct)
    assert list(result) == [1, 2, 4, 8]
    for n, value in result.items():
        picked = [
            correct[p, max(subset, key=lambda i: rewards[p, i])].item()  # noqa: B023
            for p in range(4)
            for subset in itertools.combinations(range(8), n)
        ]
        assert value == pytest.approx(sum(picked) / len(picked))
    assert result[1] == pytest.approx(correct.mean().item())


def test_a_reward_model_learns_and_looks_at_the_last_token(micro_model, micro_tokenizer):
    pairs, cpu = Pairs(*encode_pairs(preferences("train", 0, 3), micro_tokenizer), 1024, 0), torch.device("cpu")
    model = RewardModel(micro_model)
    optimizer = make_optimizer(model)
    history = [_train_step(model, optimizer, pairs.batch(0), reward_loss, 3e-3, cpu) for _ in range(12)]
    assert history[-1][0] < 0.5 * history[0][0] and history[-1][3]["accuracy"] > history[0][3]["accuracy"]
    batch = pairs.batch(0)[0]
    lengths, together = (batch["doc_ids"] >= 0).sum(1).tolist(), model(batch["tokens"], batch["doc_ids"])
    for i, n in enumerate(lengths):  # a row without its padding, read at its end
        state_D = micro_model.norm(micro_model.hidden(batch["tokens"][i : i + 1, :n])[0])[0, -1]
        torch.testing.assert_close(together[i : i + 1], model.value(state_D), rtol=1e-4, atol=1e-5)
    chosen_B, rejected_B = together.chunk(2)
    assert (chosen_B - rejected_B).mean() > 0


def test_every_epoch_takes_each_pair_once_in_another_order():
    def batches(seed):
        pairs = Pairs([[([i], [1])] * 2 for i in range(20)], {}, 64, seed)
        return lambda step: pairs.batch(step)[0]["tokens"].chunk(2)[0].flatten().tolist()

    ours, other = batches(0), batches(1)
    taken = [i for step in range(5) for i in ours(step)]  # two epochs of 20 in steps of 8
    assert sorted(taken[:20]) == sorted(taken[20:]) == list(range(20)) and taken[:20] != taken[20:]
    assert ours(1) == taken[8:16] and other(0) != taken[:8]  # of the seed and the step alone


def test_rewards_keep_their_order_and_accuracy_counts_the_chosen(micro_model, micro_tokenizer):
    model = RewardModel(micro_model).eval()
    chats = [[{"role": "user", "content": "word " * n}, {"role": "assistant", "content": "a"}] for n in (9, 1, 5, 3)]
    alone = [rewards(model, micro_tokenizer, [chat])[0] for chat in chats]
    assert rewards(model, micro_tokenizer, chats, rows=3) == pytest.approx(alone, abs=1e-4)
    assert len({round(reward, 3) for reward in alone}) == 4
    pairs = Pairs(*encode_pairs(preferences("test", 0, 3), micro_tokenizer), 1024, 0)
    judged = [rewards(model, micro_tokenizer, [[*p["messages"], {"role": "assistant", "content": p[side]}]])[0]
              for p in preferences("test", 0, 3) for side in ("chosen", "rejected")]  # fmt: skip
    wins = [chosen > rejected for chosen, rejected in zip(judged[::2], judged[1::2], strict=True)]
    assert pair_accuracy(model, pairs, rows=5) == pytest.approx(sum(wins) / len(wins)) and 0 < sum(wins) < len(wins)


def test_the_average_of_the_members_is_saved(micro_model, tmp_path):
    members = [RewardModel(copy.deepcopy(micro_model), seed) for seed in (0, 1, 2)]
    for member in members:
        torch.nn.init.normal_(member.backbone.blocks[0].attention.qkv.weight)
    for i, member in enumerate(members):
        save_checkpoint(str(tmp_path / f"reward/{i}" / "step_7.pt"), member, step=7, stage=f"reward/{i}", tokenizer_hash="", seed=0)
    save_checkpoint(str(tmp_path / "reward" / "step_9.pt"), members[0], step=9, stage="reward", tokenizer_hash="", seed=0)  # older
    average_members(str(tmp_path), [f"reward/{i}" for i in range(3)], torch.device("cpu"), 0)
    model, state = load_reward_model(str(tmp_path), torch.device("cpu"))
    averaged, parts = model.state_dict(), [member.state_dict() for member in members]
    for name in ("value.weight", "backbone.blocks.0.attention.qkv.weight", "backbone.norm.weight"):
        torch.testing.assert_close(averaged[name], sum(part[name] for part in parts) / 3)
    assert state["step"] == 7 and not torch.equal(model.value.weight, members[0].value.weight)


def test_a_member_that_is_not_finite_is_named_and_not_averaged(micro_model, tmp_path):
    for i, member in enumerate((RewardModel(copy.deepcopy(micro_model)), RewardModel(copy.deepcopy(micro_model)))):
        if i:
            torch.nn.init.constant_(member.backbone.norm.weight, torch.nan)
        save_checkpoint(str(tmp_path / f"reward/{i}" / "step_7.pt"), member, step=7, stage=f"reward/{i}", tokenizer_hash="", seed=0)
    with pytest.raises(ValueError, match="reward/1/step_7.pt: tensor backbone.norm.weight is not finite"):
        average_members(str(tmp_path), ["reward/0", "reward/1"], torch.device("cpu"), 0)
    assert not list(tmp_path.glob("reward/step_*.pt"))


def test_members_start_from_one_head(micro_model):
    heads = [RewardModel(micro_model, seed).value.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


@pytest.mark.parametrize(
    "messages,problem",
    [
        ("hi", 'field "messages" is missing, empty or no list'),
        ([], 'field "messages" is missing, empty or no list'),
        (["hi"], "a message needs a role"),
        ([{"role": "buyer", "content": "hi"}], "got {'role': 'buyer'"),
        ([{"role": "assistant", "content": "hi", "think": 3}, {"role": "user", "content": "q"}], "think, if any.*'think': 3"),
        ([{"role": "system", "content": "hi"}], "the last message must be the user's"),
    ],
)
def test_faulty_pairs_have_their_line(tmp_path, messages, problem):
    good = {"messages": [{"role": "user", "content": "hi"}], "chosen": "a", "rejected": "b"}
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps({**good, "messages": messages}))
    with pytest.raises(ValueError, match=f"pairs.jsonl:2: .*{problem}"):
        read_pairs(str(path))


def test_answers_that_are_missing_or_no_text_have_their_line(tmp_path):
    good = {"messages": [{"role": "user", "content": "hi"}], "chosen": "a", "rejected": "b"}
    path = tmp_path / "pairs.jsonl"
    for field, value in (("chosen", 3), ("rejected", None)):
        path.write_text(json.dumps(good) + "\n" + json.dumps({**good, field: value}))
        with pytest.raises(ValueError, match=f'pairs.jsonl:2: field "{field}" is missing or no text'):
            read_pairs(str(path))
    path.write_text("")
    with pytest.raises(ValueError, match="pairs.jsonl: empty file"):
        read_pairs(str(path))
    with pytest.raises(ValueError, match="nowhere.jsonl: no such file of pairs"):
        read_pairs(str(tmp_path / "nowhere.jsonl"))
