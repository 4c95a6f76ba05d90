"""dpo.py: log-probabilities against whole logits, the loss against its closed form and trl's trainer, the choice of pairs by rule."""

import argparse
import copy
import math
import shutil
from dataclasses import replace

import pytest
import torch

from checkpoint import latest_stage, load_latest, load_model, read_metrics, save_checkpoint
from data.preferences import preferences
from dpo import (
    EXPLORING,
    ROUND,
    add_reference,
    alarm,
    dpo_loss,
    dpo_objective,
    label,
    online,
    preference_metrics,
    reward_judge,
    sample_answers,
    select_pair,
    token_logprobs,
    tune,
)
from generate import Completion, generate
from otpo import otpo_loss, otpo_objective, uniform_weights
from reward import PAIRS, Pairs, RewardModel, encode_pairs, rewards
from tests.test_otpo import pot_weights
from train import _train_step, make_optimizer


def test_token_logprobs_equal_whole_logits(micro_model):
    tokens = torch.randint(0, 500, (3, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(3, 20)
    mask[0, 5:9], mask[1, 0:3], mask[2, 19] = 1, 1, 1  # the first token of a row has nothing before it
    logp, hidden = token_logprobs(micro_model, tokens, mask, return_hidden=True, rows=3)
    logits = micro_model(tokens)
    reference = torch.zeros(3, 20)
    for b, t in [(0, 5), (0, 6), (0, 7), (0, 8), (1, 1), (1, 2), (2, 19)]:
        reference[b, t] = logits[b, t - 1].log_softmax(-1)[tokens[b, t]]
        torch.testing.assert_close(micro_model.head(hidden[b, t]), logits[b, t - 1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logp, reference, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(logp.sum(), micro_model.head.weight)[0]
    theirs = torch.autograd.grad(reference.sum(), micro_model.head.weight)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_loss_and_gradient_by_hand():
    policy = [torch.tensor([-2.0, -1.0], requires_grad=True), torch.tensor([-3.0, -4.0], requires_grad=True)]
    ref = torch.tensor([-2.5, -1.0]), torch.tensor([-2.0, -4.0])
    loss, chosen, rejected = dpo_loss(*policy, *ref, beta=0.5)
    # margins 0.5 (0.5 - -1) = 0.75 and 0: -log σ = log(1 + e^-0.75), log 2; d/dchosen = -β σ(-margin) / B
    assert loss.item() == pytest.approx((math.log1p(math.exp(-0.75)) + math.log(2)) / 2)
    assert chosen.tolist() == [0.25, 0.0] and rejected.tolist() == [-0.5, 0.0] and not chosen.requires_grad
    loss.backward()
    expected = [-0.5 / (1 + math.exp(0.75)) / 2, -0.5 * 0.5 / 2]
    assert policy[0].grad.tolist() == pytest.approx(expected) and policy[1].grad.tolist() == pytest.approx([-x for x in expected])


def test_symmetry_and_start():
    g = torch.Generator().manual_seed(0)
    a, b, c, d = (torch.randn(6, generator=g) for _ in range(4))
    assert dpo_loss(a, b, a, b, 0.1)[0].item() == pytest.approx(math.log(2))
    margin = 0.1 * ((a - c) - (b - d))
    swapped = dpo_loss(b, a, d, c, 0.1)
    assert (swapped[0] - dpo_loss(a, b, c, d, 0.1)[0]).item() == pytest.approx(margin.mean().item(), abs=1e-6)
    torch.testing.assert_close(swapped[1], dpo_loss(a, b, c, d, 0.1)[2])
    assert dpo_loss(a, b, c, d, 0.0)[0].item() == pytest.approx(math.log(2))


def test_pairs_by_rule():
    answers, rewards = ["a", "b", "c", "d"], [0.1, 0.9, 0.5, 0.2]
    assert select_pair(answers, rewards) == ("b", "a")
    assert select_pair(answers, rewards, correct=[False, False, True, True]) == ("c", "b")  # best right, best wrong
    for correct in ([True] * 4, [False] * 4):
        assert select_pair(answers, rewards, correct) is None
    assert select_pair(["x"] * 3, [1.0, 2.0, 3.0]) is None and select_pair(["x", "y"], [1.0, 1.0]) is None
    assert select_pair([], []) is None and select_pair([], [], correct=[]) is None


def test_equals_trl_on_the_same_model_and_batch(pair, tmp_path):
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    ours, theirs = pair
    theirs.config.router_aux_loss_coef = 0.0
    g = torch.Generator().manual_seed(0)
    names, sizes = ("prompt_ids", "chosen_ids", "rejected_ids"), ((5, 4, 7), (3, 6, 2), (8, 1, 1))
    examples = [
        {name: torch.randint(2, 500, (n,), generator=g).tolist() for name, n in zip(names, lengths, strict=True)} for lengths in sizes
    ]
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))
    trainer = DPOTrainer(
        theirs, ref_model=copy.deepcopy(theirs), train_dataset=Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}),
        args=DPOConfig(str(tmp_path), beta=0.3, use_cpu=True, report_to="none", bf16=False, gradient_checkpointing=False),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>"),
    )  # fmt: skip
    reference = copy.deepcopy(ours)
    with torch.no_grad():  # the policies move away from the references, together
        ours.head.weight.mul_(1.5)
        theirs.lm_head.weight.mul_(1.5)
    inputs = trainer.data_collator(examples)
    their_loss = trainer.compute_loss(trainer.model, inputs)
    their_loss.backward()

    tokens, mask = inputs["input_ids"], inputs["completion_mask"]
    policy = token_logprobs(ours, tokens, mask).sum(1).chunk(2)
    with torch.no_grad():
        fixed = token_logprobs(reference, tokens, mask).sum(1).chunk(2)
    loss, *_ = dpo_loss(*policy, *fixed, beta=0.3)
    loss.backward()
    assert loss.item() != pytest.approx(math.log(2), abs=1e-3) and loss.item() == pytest.approx(their_loss.item(), rel=1e-5)
    torch.testing.assert_close(ours.head.weight.grad, theirs.lm_head.weight.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.embedding.weight.grad, theirs.model.embed_tokens.weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beta", [0.0, -0.1, float("nan"), float("inf")])
def test_a_pull_that_is_none_is_refused(beta):
    with pytest.raises(ValueError, match="--beta is .*, must be over 0"):
        tune("dpo", dpo_objective(beta), argparse.Namespace(beta=beta, rounds=0))


def test_what_cannot_be_trained_on_is_counted(micro_tokenizer, capsys):
    prompt = [{"role": "user", "content": "hat?"}]
    good = {"messages": prompt, "chosen": "red", "rejected": "blue"}
    bad = [
        {**good, "rejected": "red "}, {**good, "chosen": " "}, {**good, "rejected": ""},
        {**good, "messages": [{"role": "user", "content": "word " * 200}]}, {**good, "chosen": "very " * 200},
    ]  # fmt: skip
    pairs = Pairs(*encode_pairs([good, *bad], micro_tokenizer), 64, 0)
    assert len(pairs.rows) == 1 and pairs.left_out == {"identical answers": 1, "an empty answer": 2, "longer than the context of 64": 2}
    assert "1 pairs; left out: 1 identical answers, 2 an empty answer, 2 longer than the context of 64" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no pair is left"):
        Pairs(*encode_pairs(bad, micro_tokenizer), 64, 0)


def test_only_the_last_answer_is_judged(micro_tokenizer):
    chat = [{"role": "user", "content": "hat?"}, {"role": "assistant", "content": "which"}, {"role": "user", "content": "mine"}]
    (batch,) = Pairs(*encode_pairs([{"messages": chat, "chosen": "red", "rejected": "blue"}], micro_tokenizer), 64, 0).batch(0)
    for row, answer in ((0, "red"), (PAIRS, "blue")):
        kept = batch["tokens"][row][batch["mask"][row] > 0].tolist()
        assert kept == [*micro_tokenizer.encode(" " + answer), micro_tokenizer.special["<|end|>"]]


def completion(tokenizer, text, stopped=True, think=None):
    ids = tokenizer.encode(" " + text)
    if think:
        ids = [tokenizer.special["<think>"], *tokenizer.encode(" " + think), tokenizer.special["</think>"], *ids]
    return Completion(tokenizer.decode(ids), ids, [0.0] * len(ids), stopped)


def test_sampled_answers_become_pairs_by_the_reports_rules(micro_tokenizer):
    t, user = micro_tokenizer, [{"role": "user", "content": "?"}]
    examples = [
        {"messages": user, "answer": "7", "scorer": "number", "think": "3 + 4"}, {"messages": user, "answer": "red", "scorer": "exact"},
        {"messages": user, "answer": "red", "scorer": "exact"}, {"messages": user, "answer": "soft red", "scorer": "covers"},
    ]  # fmt: skip
    sampled = [
        [completion(t, "8", think="long"), completion(t, "7", think="a"), completion(t, "7", think="bb"), completion(t, "9", False)],
        [completion(t, "red")] * 4, [completion(t, "blue"), completion(t, "green"), completion(t, "", False), completion(t, "Red.", False)],
        [completion(t, text) for text in ("soft red", "red", "soft red!", "blue")],
    ]  # fmt: skip
    prompts = [t.encode_chat(task["messages"], thinking="think" in task)[0] for task in examples]
    worth = {"8": 5.0, "7": 1.0, "soft red": 1.0, "red": 3.0, "soft red!": 2.0, "blue": -1.0, "green": 0.0}
    flat = [one for answers in sampled for one in answers]
    rows, left_out = label(t, examples, prompts, flat, lambda task, answers: [worth[answer] for answer in answers])
    assert left_out == {"unfinished or empty answers": 3, "prompts with all answers right": 1, "prompts with all answers wrong": 1}
    answers = [[t.decode([i for i, m in zip(ids, mask, strict=True) if m]) for ids, mask in row] for row in rows]
    # a checkable answer: right against wrong, whatever the reward says; an open one: by reward alone
    assert answers == [["<think> a</think> 7<|end|>", "<think> long</think> 8<|end|>"], [" red<|end|>", " blue<|end|>"]]
    assert all(ids[: len(prompt)] == prompt for prompt, row in zip((prompts[0], prompts[3]), rows, strict=True) for ids, _ in row)
    mixed, left_out = label(t, examples, prompts, flat, lambda task, answers: [worth[answer] for answer in answers], off_policy=True)
    assert left_out == {"unfinished or empty answers": 3, "prompts with all answers right": 1}  # the task's answer goes with wrong ones
    (thought, wrong), (red, green), (soft_red, wrong_red) = mixed
    assert t.decode(thought[0]).endswith("<think> 3 + 4</think> 7<|end|>") and wrong == rows[0][1]
    assert sum(thought[1]) == len(t.encode(" 3 + 4")) + len(t.encode(" 7")) + 3
    endings = [t.decode(ids[sum(m == 0 for m in mask) :]) for ids, mask in (red, green, soft_red, wrong_red)]
    assert endings == [" red<|end|>", " green<|end|>", " soft red<|end|>", " red<|end|>"]  # the best of the wrong ones
    alike = label(t, examples[3:], prompts[3:], [completion(t, "blue")] * 4, lambda task, answers: [0.0] * len(answers))[1]
    assert alike["prompts with all answers alike"] == 1  # an open task has no wrong answers
    blank = [completion(t, ""), completion(t, "soft red"), completion(t, "", think="long"), completion(t, "red")]
    rows, left_out = label(t, examples[3:], prompts[3:], blank, lambda task, answers: [worth.get(answer, 9.0) for answer in answers])
    assert left_out == {"unfinished or empty answers": 2} and t.decode(rows[0][0][0]).endswith(" red<|end|>")  # no judge prefers no answer
    nothing = [completion(t, "", False)] * 4
    assert label(t, examples[:1], prompts[:1], nothing, None)[1]["prompts with all answers unfinished"] == 1


def test_samples_are_those_of_each_prompt_alone(micro_model, micro_tokenizer):
    """Prompt-major, thinking where the task has a thought."""
    examples = [{"messages": [{"role": "user", "content": "1?"}]}, {"messages": [{"role": "user", "content": "2?"}], "think": "so"}]
    micro_model.config.max_seq_len = 100
    prompts, completions = sample_answers(micro_model, micro_tokenizer, examples, 2, seed=3)
    assert prompts == [micro_tokenizer.encode_chat(task["messages"], thinking="think" in task)[0] for task in examples]
    alone = [made for prompt in prompts for made in generate(micro_model, micro_tokenizer, [prompt], replace(EXPLORING, seed=3), 2)]
    assert [made.ids for made in completions] == [made.ids for made in alone] and completions[0].ids != completions[1].ids


def test_alarms():
    fine = {"chosen_drift": -0.2, "kl": 0.1}
    assert alarm(fine) is None
    assert "chosen answers have lost 1.5 nats" in alarm({**fine, "chosen_drift": -1.5}) and "KL" in alarm({**fine, "kl": 3.0})


def test_otpo_weighs_the_tokens_by_transport(micro_model, micro_tokenizer):
    """The objective against POT on the states that predict the answers; "ones" is DPO, and the three ways differ."""
    pairs = Pairs(*encode_pairs(preferences("train", 0, 3), micro_tokenizer), 1024, 0)
    add_reference(pairs, micro_model)
    micro_model.head.weight.data.mul_(1.5)  # away from the reference
    (batch,) = pairs.batch(0)
    masks = batch["mask"].float().chunk(2)
    with torch.no_grad():
        logp_BT = token_logprobs(micro_model, batch["tokens"], batch["mask"], doc_ids_BT=batch["doc_ids"])
        states_BTD = micro_model.norm(micro_model.hidden(batch["tokens"], doc_ids_BT=batch["doc_ids"])[0])
        predicting_BTD = states_BTD.roll(1, 1).double()  # row t: the state that predicts token t; no answer begins a row
        transport = pot_weights(*predicting_BTD.chunk(2), *(mask.double() for mask in masks), 1.0, 0.2)
        expected = {
            name: otpo_loss(*logp_BT.chunk(2), *batch["reference"].chunk(2), *weights, 0.1)[0].item()
            for name, weights in (("transport", transport), ("uniform", uniform_weights(*masks)), ("ones", masks))
        }
        ours = {name: otpo_objective(0.1, name)(micro_model, batch)[0].item() for name in expected}
        assert ours == pytest.approx(expected, rel=1e-4)
        assert ours["ones"] == pytest.approx(dpo_objective(0.1)(micro_model, batch)[0].item(), rel=1e-5)
    assert len({round(loss, 4) for loss in ours.values()}) == 3


def test_the_judge_rewards_the_answer_that_was_given(micro_model, micro_tokenizer):
    model = RewardModel(micro_model).eval()
    task = {"messages": [{"role": "user", "content": "which?"}], "answer": "a"}
    a, b = (rewards(model, micro_tokenizer, [[*task["messages"], {"role": "assistant", "content": x}]])[0] for x in ("a", "b c"))
    assert reward_judge(model, micro_tokenizer)(task, ["b c", "a", "b c"]) == pytest.approx([b, a, b], abs=1e-5) and abs(a - b) > 1e-3


OBJECTIVES = [dpo_objective(0.1), *(otpo_objective(0.1, weights) for weights in ("transport", "uniform", "ones"))]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_few_steps_prefer_the_chosen(micro_model, micro_tokenizer, objective):
    pairs = Pairs(*encode_pairs(preferences("train", 0, 3), micro_tokenizer), 1024, 0)
    add_reference(pairs, micro_model)
    optimizer, cpu = make_optimizer(micro_model), torch.device("cpu")
    history = [_train_step(micro_model, optimizer, pairs.batch(0), objective, 3e-3, cpu) for _ in range(8)]
    first, last = history[0][3], history[-1][3]
    assert history[0][0] == pytest.approx(math.log(2), abs=1e-5) and first["kl"] == pytest.approx(0, abs=1e-6)
    assert history[-1][0] < 0.6 and last["margin"] > 0 and last["accuracy"] >= 0.75 > first["accuracy"] and last["kl"] > 0
    batch = pairs.batch(0)[0]  # the chosen answers are the first half: it is they that gained
    with torch.no_grad():
        gain_BT = token_logprobs(micro_model, batch["tokens"], batch["mask"], doc_ids_BT=batch["doc_ids"]) - batch["reference"]
    chosen_B, rejected_B = gain_BT.sum(1).chunk(2)
    assert (chosen_B - rejected_B).mean() > 0


def test_kl_by_hand():
    """Half the mean square of an answer's gain: second order of the KL, and finite however unlikely a rejected answer becomes."""
    logp = torch.tensor([[0.0, -1.0, -2.0], [0.0, -900.0, 0.0]])
    batch = {"mask": torch.tensor([[0.0, 1, 1], [0, 1, 0]]), "reference": torch.tensor([[0.0, -1.5, -2.0], [0.0, 0.0, 0.0]])}
    metrics = preference_metrics(logp, batch, torch.ones(1), torch.zeros(1))
    assert metrics["kl"].item() == pytest.approx((0.5**2 / 4 + 900**2 / 2) / 2)
    assert metrics["chosen_drift"].item() == pytest.approx(0.5 / 2) and metrics["logp_chosen"].item() == pytest.approx(-3)


@pytest.mark.parametrize("stage", ["sft1", "sft2"])
def test_rounds_ask_for_thoughts_where_they_were_taught(stage, micro_model, micro_tokenizer, tmp_path, monkeypatch):
    micro_tokenizer.save(tmp_path)
    common = dict(tokenizer_hash=micro_tokenizer.hash, step=1)
    save_checkpoint(str(tmp_path / stage / "step_1.pt"), micro_model, stage=stage, **common)
    save_checkpoint(str(tmp_path / "reward" / "step_1.pt"), RewardModel(micro_model), stage="reward", **common)
    asked = []

    def sampled(model, tokenizer, examples, n, seed):
        asked.extend(examples)
        raise StopIteration

    monkeypatch.setattr("dpo.sample_answers", sampled)
    args = argparse.Namespace(run=str(tmp_path), data=None, device="cpu", seed=0, steps=4, resume=False, rounds=1, parallel=None)
    with pytest.raises(StopIteration):
        online("dpo", dpo_objective(0.1), args)
    assert any("think" in task for task in asked) == (stage == "sft2") and len(asked) > 100


def test_rounds_go_on_where_they_were(micro_model, micro_tokenizer, tmp_path, monkeypatch, capsys):
    """Two rounds with fabricated samples: the second starts from the first, the reference stays, a finished round is not sampled again."""
    micro_tokenizer.save(tmp_path)
    common = dict(tokenizer_hash=micro_tokenizer.hash, step=1)
    save_checkpoint(str(tmp_path / "sft2" / "step_1.pt"), micro_model, stage="sft2", **common)
    save_checkpoint(str(tmp_path / "reward" / "step_1.pt"), RewardModel(micro_model), stage="reward", **common)
    starts, seeds = [], []

    def sampled(model, tokenizer, examples, n, seed):
        starts.append(model.head.weight.detach().clone())
        seeds.append(seed)
        prompts = [tokenizer.encode_chat(task["messages"])[0] for task in examples]
        return prompts, [completion(tokenizer, text) for task in examples for text in (task["answer"], "wrong")]

    monkeypatch.setattr("dpo.sample_answers", sampled)
    made = [{"messages": [{"role": "user", "content": f"{i}?"}], "answer": str(i), "scorer": "number"} for i in range(9)]
    monkeypatch.setattr("dpo.tasks", lambda split, seed, per_task: seeds.append((split, seed)) or made)
    args = argparse.Namespace(run=str(tmp_path), data=None, device="cpu", seed=0, steps=4, resume=False, rounds=2, parallel=None)
    monkeypatch.setattr("dpo.KL", 0.0)  # so that every step after a round's first is one to warn of
    online("dpo", dpo_objective(0.1), args, schedule=ROUND._replace(peak=1e-3))
    assert torch.equal(starts[0], micro_model.head.weight) and not torch.equal(starts[1], starts[0])
    assert len(set(seeds)) == len(seeds) == 4  # each round has prompts and samples of its own
    first, second = load_latest(str(tmp_path), "dpo/1")["model"], load_latest(str(tmp_path), "dpo")["model"]
    assert torch.equal(first["head.weight"], starts[1]) and not torch.equal(second["head.weight"], starts[1])
    logged = [entry for entry in read_metrics(str(tmp_path)) if entry["stage"].startswith("dpo")]
    assert [entry["stage"] for entry in logged] == ["dpo/1"] * 4 + ["dpo"] * 4
    assert "the KL from the reference is about" in logged[3]["warning"] and "warning" not in logged[0]
    assert logged[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and logged[4]["kl"] > 1e-6  # round 2 is measured against the reference
    online("dpo", dpo_objective(0.1), argparse.Namespace(**{**vars(args), "resume": True}))
    assert len(starts) == 2 and capsys.readouterr().out.count("already finished") == 1
    for changes, message in (
        ({}, "dpo already holds checkpoints"), ({"data": "mine.jsonl"}, "--data mine.jsonl with --rounds"),
        ({"resume": True, "rounds": 3}, "dpo was begun with fewer rounds than 3"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            online("dpo", dpo_objective(0.1), argparse.Namespace(**{**vars(args), **changes}))
    for rounds in (0, 1):
        with pytest.raises(ValueError, match=f"dpo was begun with more rounds than {rounds}"):
            tune("dpo", dpo_objective(0.1), argparse.Namespace(**{**vars(args), "resume": True, "rounds": rounds, "beta": 0.1}))
    assert len(starts) == 2  # nothing was sampled in vain
    save_checkpoint(str(tmp_path / "reward" / "step_2.pt"), RewardModel(micro_model), stage="reward", tokenizer_hash="another", step=2)
    with pytest.raises(ValueError, match="is not the one that reward was trained with"):
        online("otpo", otpo_objective(0.1), args, off_policy=True)
    shutil.rmtree(tmp_path / "reward")
    save_checkpoint(str(tmp_path / "reward" / "step_1.pt"), RewardModel(micro_model), stage="reward", **common)
    with pytest.raises(ValueError, match="stage reward is a reward model"):
        load_model(load_latest(str(tmp_path), "reward"))
    online("otpo", otpo_objective(0.1), args, off_policy=True)
    assert latest_stage(str(tmp_path)) == "otpo"
    torch.nn.init.ones_(micro_model.head.weight)
    save_checkpoint(str(tmp_path / "sft2" / "step_1.pt"), micro_model, stage="sft2", **common)  # trained anew: another reference
    with pytest.raises(ValueError, match=r"otpo was begun from sft2 \w{8}, and now it would be from sft2 \w{8}: delete"):
        online("otpo", otpo_objective(0.1), argparse.Namespace(**{**vars(args), "resume": True}), off_policy=True)
