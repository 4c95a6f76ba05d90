"""train.py and checkpoint.py: resume is exact, kills lose nothing saved, bad steps are skipped, bad files are named."""

import argparse
import copy
import dataclasses
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import checkpoint
import resharding
from checkpoint import checkpoints, inherit, load_checkpoint, load_latest, load_model, read_metrics, rewind_metrics, save_checkpoint
from compass import CONFIGS, Compass
from data import market, reader
from train import (
    RECIPES,
    Schedule,
    Tokenised,
    TokenRows,
    _train_step,
    fit,
    language_model_loss,
    lr_at,
    make_optimizer,
    run_stage,
    stage_schedule,
)


@pytest.fixture
def rows(micro_tokenizer):
    return TokenRows(Tokenised(market.documents("general", 3, per_language=5), micro_tokenizer), 64, seed=1)


@pytest.fixture
def made(monkeypatch):
    """The optimizers that `fit` makes."""
    made = []
    monkeypatch.setattr("train.make_optimizer", lambda *args: made.append(make_optimizer(*args)) or made[-1])
    return made


def train(config, rows, run, steps, **kwargs):
    torch.manual_seed(0)
    model = Compass(config)
    schedule = Schedule(12, 1e-3, 1e-4, warmup=3, router=(1.0, 0.1))
    save_every = kwargs.pop("save_every", 4)
    batches = rows.batches(4, 2)

    def until(step):
        if step == steps:
            raise InterruptedError
        return batches(step)

    try:
        fit(model, until, language_model_loss, schedule, run=str(run), stage="general", save_every=save_every, **kwargs)
    except InterruptedError:
        pass
    return model


def test_learning_rate_by_hand():
    schedule = Schedule(steps=110, peak=1.0, final=0.1, warmup=10)
    assert lr_at(0, schedule) == pytest.approx(0.1) and lr_at(9, schedule) == pytest.approx(1.0)
    assert lr_at(60, schedule) == pytest.approx(0.55) and lr_at(110, schedule) == pytest.approx(0.1)
    assert lr_at(35, schedule) > 0.8 and lr_at(35, schedule._replace(shape="linear")) == pytest.approx(0.775)


def test_full_recipes_are_the_papers():
    general, anneal, long = (RECIPES["v2_30b"][stage] for stage in ("general", "anneal", "long"))
    assert general.schedule.peak == 3e-4 and general.schedule.final == pytest.approx(3e-5) and general.schedule.warmup == 3000
    assert (general.rows, anneal.rows, long.rows) == (5760, 8640, 2160)
    assert anneal.schedule.peak == pytest.approx(1.5e-4) and anneal.schedule.warmup == 2000
    assert long.schedule.steps == 2200 and long.seq_len == 32768 and long.rope_base == 1e6
    assert general.schedule.steps * general.rows * general.seq_len == pytest.approx(8e12, rel=1e-4)
    assert (anneal.schedule.final, long.schedule.peak, long.schedule.final) == pytest.approx((3e-5, 3e-5, 3e-5))
    assert [stage.schedule.router for stage in (general, anneal, long)] == [(1, 0.1), (0.1, 0.1), (0.1, 0.1)]


def test_rows_hold_every_token_of_an_epoch_once(rows):
    seen = np.concatenate([ids for i in range(rows.rows_per_epoch) for ids, _ in rows.row(i)])
    left = rows.total - len(seen)
    assert 0 <= left < rows.length
    counts = np.bincount(np.concatenate(rows.tokenised.documents), minlength=512) - np.bincount(seen.astype(int), minlength=512)
    assert counts.min() >= 0 and counts.sum() == left
    again = rows.row(3)
    rows.row(rows.rows_per_epoch + 1)  # another epoch in between changes nothing
    assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(again, rows.row(3), strict=True))


def test_steps_take_row_after_row_and_each_epoch_has_its_order(rows):
    taken = torch.cat([batch["tokens"] for step in (0, 1) for batch in rows.batches(3, 2)(step)])
    for i in range(6):
        assert np.array_equal(taken[i], np.concatenate([ids for ids, _ in rows.row(i)]))
        assert all(np.array_equal(mask, np.ones(len(ids))) for ids, mask in rows.row(i))  # the end of a document is learnt, too
    first, second = (np.concatenate([ids for ids, _ in rows.row(i)]) for i in (0, rows.rows_per_epoch))
    assert not np.array_equal(first, second)


def test_decay_is_on_matrices_and_gradients_are_clipped(micro_model, rows):
    optimizer = make_optimizer(micro_model)
    matrices, vectors = optimizer.param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0) and matrices["betas"] == (0.9, 0.95)
    assert {p.dim() >= 2 for p in matrices["params"]} == {True} and {p.dim() for p in vectors["params"]} == {1}

    def loss(model, batch):
        loss, metrics = language_model_loss(model, batch)
        return 1e3 * loss, metrics

    _, norm, *_ = _train_step(micro_model, optimizer, rows.batches(2, 2)(0), loss, 0.0, torch.device("cpu"))
    left = torch.nn.utils.get_total_norm([p.grad for p in micro_model.parameters()])
    assert norm > 10 and left.item() == pytest.approx(1, rel=1e-3)


def test_the_schedules_second_beta_reaches_the_optimizer(micro_config, rows, tmp_path, made):
    for stage, beta2 in (("general", 0.99), ("anneal", 0.95)):
        schedule = RECIPES["tiny" if beta2 == 0.99 else "v2_30b"][stage].schedule._replace(steps=1)
        fit(Compass(micro_config), rows.batches(2, 2), language_model_loss, schedule, run=str(tmp_path), stage=stage)
        assert made[-1].param_groups[0]["betas"] == (0.9, beta2)


def test_the_schedule_and_the_watch_reach_every_step(micro_config, rows, tmp_path, made, monkeypatch):
    seen, schedule = [], Schedule(5, 1e-3, 1e-4, warmup=2, router=(1.0, 0.2))

    def loss(model, batch):
        seen.append(model.router_scale)
        return language_model_loss(model, batch)

    said = []
    monkeypatch.setattr("train.tqdm.write", lambda bar, text: said.append(text))
    fit(Compass(micro_config), rows.batches(2, 2), loss, schedule, run=str(tmp_path), stage="general", watch=lambda _: "look")
    assert said == ["general step 0: look (said once; see metrics.jsonl)"]
    assert seen == pytest.approx([1, 0.8, 0.6, 0.4, 0.2]) and [entry["warning"] for entry in read_metrics(tmp_path)] == ["look"] * 5
    assert made[-1].param_groups[0]["lr"] == pytest.approx(lr_at(4, schedule))


@pytest.mark.parametrize("depth", (0, 2))
def test_accumulation_has_one_global_denominator(micro_config, rows, depth):
    """Two micro-batches with very different numbers of targets give the gradient of the joint batch, MTP's too."""
    torch.manual_seed(0)
    micro_model = Compass(dataclasses.replace(micro_config, mtp_depth=depth, mtp_weight=1.0))
    joint = rows.batches(4, 4)(0)[0]
    joint["weights"][:2] *= (torch.rand(2, 64) < 0.1).float()
    joint["weights"][0, 5] = 1
    micro_model.config.aux_weight = micro_model.config.z_weight = 0  # these are averaged over micro-batches
    grads = []
    for batches in ([joint], [{k: v[:2] for k, v in joint.items()}, {k: v[2:] for k, v in joint.items()}]):
        _train_step(micro_model, make_optimizer(micro_model), batches, language_model_loss, 0.0, torch.device("cpu"))
        grads.append([p.grad.clone() for p in micro_model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_resume_is_bitwise(micro_config, rows, tmp_path):
    straight = train(micro_config, rows, tmp_path / "a", steps=None)
    train(micro_config, rows, tmp_path / "b", steps=6)  # dies in step 6; the last save was step 4
    resumed = train(micro_config, rows, tmp_path / "b", steps=None, resume=True)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    curves = [[(e["step"], e["loss"]) for e in read_metrics(tmp_path / run)] for run in "ab"]
    assert curves[0] == curves[1] and len(curves[0]) == 12


def test_a_second_run_never_overwrites(micro_config, rows, tmp_path):
    train(micro_config, rows, tmp_path, steps=None)
    with pytest.raises(ValueError, match="already holds"):
        train(micro_config, rows, tmp_path, steps=None)
    assert len(checkpoints(tmp_path, "general")) == checkpoint.KEEP


def test_an_export_is_not_resumed(micro_config, micro_model, rows, tmp_path):
    save_checkpoint(str(tmp_path / "general" / "step_3.pt"), micro_model, step=3, stage="general")
    with pytest.raises(ValueError, match="general holds weights only"):
        train(micro_config, rows, tmp_path, steps=None, resume=True)
    with pytest.raises(ValueError, match="step_3.pt holds weights only"):  # as many ranks would read it
        resharding.restore(checkpoints(tmp_path, "general")[0], micro_model, make_optimizer(micro_model))
    state = load_checkpoint(checkpoints(tmp_path, "general")[0])
    torch.save({**state, "model": {"head.qweight": torch.zeros(1)}}, buffer := io.BytesIO())
    checkpoint.write_atomically(str(tmp_path / "awq.pt"), buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest())
    with pytest.raises(ValueError, match="general is quantized and can only answer"):
        resharding.restore(str(tmp_path / "awq.pt"), micro_model)


def test_an_exported_log_gives_the_same_losses(micro_config, micro_tokenizer, tmp_path, capsys):
    """The mean of the last 50 steps, though an export keeps one line in a hundred of those before."""
    from report import stage_losses

    micro_tokenizer.save(tmp_path)
    save_checkpoint(str(tmp_path / "general" / "step_1234.pt"), Compass(micro_config), step=1234, stage="general")
    entries = [{"stage": "general", "step": i, "lm": 9 / (i + 1), "tokens_per_s": 1} for i in range(1234)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    checkpoint.export(tmp_path, tmp_path / "out")
    assert "was stopped at" not in capsys.readouterr().out
    kept = read_metrics(tmp_path / "out")
    assert len(kept) == 13 + 50 - 1  # step 1200 is of both
    expected = np.mean([entry["lm"] for entry in entries[-50:]])
    assert stage_losses(entries)[0] == stage_losses(kept)[0] == {"general": pytest.approx(expected)}
    old = [entry for entry in kept if entry["step"] % 100 == 0]  # an export that has one of these steps
    assert stage_losses(old)[0] == {"general": entries[1200]["lm"]}
    save_checkpoint(str(tmp_path / "general" / "step_1234.pt"), Compass(micro_config), step=1234, planned=2000, stage="general", base="x")
    checkpoint.export(tmp_path, tmp_path / "halfway")
    assert "general was stopped at step 1234 of 2000, which" in capsys.readouterr().out
    assert load_latest(tmp_path / "halfway", "general")["base"] == "x"


def test_what_was_begun_otherwise_is_not_resumed(micro_config, rows, tmp_path):
    train(micro_config, rows, tmp_path, steps=6, tokenizer_hash="one")
    for config, tokenizer in ((micro_config, "another"), (dataclasses.replace(micro_config, top_k=1, norm_eps=1e-5), "one")):
        with pytest.raises(ValueError, match="tokenizer one, now another" if tokenizer == "another" else "top_k 2, now 1; norm_eps"):
            train(config, rows, tmp_path, steps=None, resume=True, tokenizer_hash=tokenizer)
    train(micro_config, rows, tmp_path, steps=None, resume=True, tokenizer_hash="one")


def test_other_data_is_not_gone_on_with(micro_config, micro_tokenizer, rows, tmp_path):
    train(micro_config, rows, tmp_path, steps=6)
    own = TokenRows(Tokenised(market.documents("general", 4, per_language=5), micro_tokenizer), 64, seed=1)
    masked = copy.copy(rows)  # the same tokens, of which others are trained on
    masked.row = lambda i: [(ids, mask * (np.arange(len(ids)) > 1)) for ids, mask in rows.row(i)]
    for other in (own, masked):
        with pytest.raises(ValueError, match="general was begun on other data"):
            train(micro_config, other, tmp_path, steps=None, resume=True)
    train(micro_config, rows, tmp_path, steps=None, resume=True)


def test_sigterm_in_a_stages_last_save_ends_the_script(micro_config, rows, tmp_path, monkeypatch):
    def asked_while_saving(path, *args, **kwargs):
        save_checkpoint(path, *args, **kwargs)
        if path.endswith("step_12.pt"):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("train.save_checkpoint", asked_while_saving)
    with pytest.raises(SystemExit) as ended:
        train(micro_config, rows, tmp_path, steps=None)
    assert ended.value.code == 0 and load_latest(tmp_path, "general")["step"] == 12


def test_a_stage_goes_on_as_it_was_begun_or_not_at_all(micro_config, rows, tmp_path, capsys):
    """What --resume says of a stage of 12 steps and seed 0, whole, halfway, exported."""
    train(micro_config, rows, tmp_path, steps=6)
    twelve = Schedule(12, 1e-3, 1e-4)

    def asked(steps=None, seed=0, resume=True):
        return stage_schedule("general", argparse.Namespace(run=str(tmp_path), resume=resume, steps=steps, seed=seed), twelve)

    with pytest.raises(ValueError, match="general already holds checkpoints"):
        asked(resume=False)
    assert asked() == asked(steps=12)._replace(warmup=0) == twelve
    for other in (dict(steps=20), dict(seed=1)):
        with pytest.raises(ValueError, match="general was begun with 12 steps and seed 0, not"):
            asked(**other)
    train(micro_config, rows, tmp_path, steps=None, resume=True)
    assert asked() is None and "general: already finished" in capsys.readouterr().out
    state = load_latest(tmp_path, "general")
    save_checkpoint(str(tmp_path / "general" / "step_12.pt"), Compass(micro_config), step=12, stage="general", seed=state["seed"])
    assert asked() is None  # an export has no plan


def test_a_stage_goes_on_from_the_base_it_was_begun_from(micro_config, rows, tmp_path):
    """Which stage dpo or sft2 starts from is whichever is there: one that was trained meanwhile would change weights and data unsaid."""
    args = argparse.Namespace(run=str(tmp_path), resume=True, steps=None, seed=0)
    schedule = stage_schedule("dpo", args, Schedule(2, 1e-3, 1e-4), "sft1")
    fit(Compass(micro_config), rows.batches(2, 2), language_model_loss, schedule, run=str(tmp_path), stage="dpo")
    assert load_latest(tmp_path, "dpo")["base"] == "sft1" and stage_schedule("dpo", args, schedule, "sft1") is None
    with pytest.raises(ValueError, match="dpo was begun from sft1, and now it would be from sft2: delete"):
        stage_schedule("dpo", args, schedule, "sft2")
    args.beta, args.weights = 0.1, "transport"
    assert stage_schedule("otpo", args, schedule, "sft1").base == "sft1, --beta 0.1, --weights transport"
    for full, batching, base in (("none", "packed", "long"), ("e-commerce", "padded", "long, --full e-commerce, --batching padded")):
        tuned = argparse.Namespace(run=str(tmp_path), resume=True, steps=None, full=full, batching=batching)
        assert stage_schedule("sft1", tuned, schedule, "long").base == base


def test_another_config_than_that_of_the_stage_before_is_named(micro_config, micro_tokenizer, tmp_path):
    micro_tokenizer.save(tmp_path)
    path = str(tmp_path / "general" / "step_1.pt")
    save_checkpoint(path, Compass(micro_config), step=1, stage="general", tokenizer_hash=micro_tokenizer.hash)
    args = argparse.Namespace(config="tiny", run=str(tmp_path), data=None, steps=1, seed=0, resume=False)
    with pytest.raises(ValueError, match="general is not of --config tiny .n_layers 2, now 3; dim 32, now 128"):
        run_stage("anneal", args, torch.device("cpu"), micro_tokenizer)


def test_stages_of_one_folder_draw_their_own_order(micro_tokenizer, tmp_path, monkeypatch):
    import train as script

    lines = (json.dumps({"text": document["text"]}) for document in market.documents("general", 0, per_language=9))
    (tmp_path / "th.jsonl").write_text("\n".join(lines))
    seen = []
    monkeypatch.setattr(script, "fit_stage", lambda model, batches, *rest: seen.append(batches(0)[0]["tokens"]))
    monkeypatch.setattr(script, "model_from", lambda *_, **__: Compass(CONFIGS["tiny"]))
    state = dict(config=dataclasses.asdict(CONFIGS["tiny"]), tokenizer_hash=micro_tokenizer.hash, stage="general", step=1, origin="general")
    monkeypatch.setattr(script, "load_latest", lambda *_, **__: state)
    for stage in ("general", "anneal", "general"):
        args = argparse.Namespace(config="tiny", run=str(tmp_path), data=str(tmp_path), steps=1, seed=0, resume=False)
        run_stage(stage, args, torch.device("cpu"), micro_tokenizer)
    rows_of = [{tuple(row.tolist()) for row in tokens} for tokens in seen]
    assert rows_of[0] == rows_of[2] and not rows_of[0] <= rows_of[1]


def test_torn_checkpoint_is_named_and_the_one_before_it_used(micro_config, rows, tmp_path, capsys, monkeypatch):
    straight = train(micro_config, rows, tmp_path, steps=None)
    newest, older = checkpoints(tmp_path, "general")
    content = open(newest, "rb").read()
    open(newest, "wb").write(content[: len(content) // 2])
    with pytest.raises(ValueError, match="step_12.pt is torn or foreign"):
        load_checkpoint(newest)
    assert load_latest(tmp_path, "general")["step"] == 8 and "step_12.pt" in capsys.readouterr().out
    resumed = train(micro_config, rows, tmp_path, steps=None, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
    open(newest, "wb").write(hashlib.sha256().digest())  # the right checksum, of nothing
    with pytest.raises(ValueError, match="step_12.pt is torn or foreign"):
        load_checkpoint(newest)
    open(newest, "wb").write(b"foreign")
    os.remove(older)
    with pytest.raises(ValueError, match="holds no intact checkpoint: delete its step_.*pt and run `python train.py --run"):
        load_latest(tmp_path, "general")
    with pytest.raises(ValueError, match="nonsense not found; the stages are general, "):
        load_latest(tmp_path, "nonsense")
    os.rename(tmp_path / "general", tmp_path / "reward")  # a folder without any stage is no less torn
    monkeypatch.setattr("sys.argv", ["checkpoint.py", "--run", str(tmp_path)])
    with pytest.raises(ValueError, match="step_12.pt is torn or foreign"):
        checkpoint.main()


def test_full_disk_leaves_the_old_checkpoint(micro_model, tmp_path, monkeypatch):
    path = str(tmp_path / "general" / "step_1.pt")
    save_checkpoint(path, micro_model, step=1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="No space left"):
        save_checkpoint(path, micro_model, step=2)
    assert load_checkpoint(path)["step"] == 1 and os.listdir(tmp_path / "general") == ["step_1.pt"]


def test_non_finite_steps_are_skipped_and_ten_in_a_row_stop(micro_config, rows, tmp_path):
    model, calls = Compass(micro_config), []

    def sick(model, batch):
        loss, metrics = language_model_loss(model, batch)
        calls.append(1)
        if len(calls) == 5:  # the loss is finite, its gradient is not
            head = model.head.weight
            return loss + (head.abs().sum() - head.abs().sum().detach()).sqrt(), metrics
        return (loss * float("nan") if len(calls) == 3 else loss), metrics

    schedule = Schedule(6, 1e-3, 1e-4)
    fit(model, rows.batches(2, 2), sick, schedule, run=str(tmp_path), stage="general")
    entries = read_metrics(tmp_path)
    assert [e["step"] for e in entries if "skipped" in e] == [2, 4] and all(p.isfinite().all() for p in model.parameters())

    def dead(model, batch):
        loss, metrics = language_model_loss(model, batch)
        return loss * float("inf"), metrics

    with pytest.raises(ValueError, match="10 non-finite steps in a row, the last at step 9"):
        fit(model, rows.batches(2, 2), dead, Schedule(50, 1e-3, 1e-4), run=str(tmp_path / "x"), stage="general")
    with pytest.raises(ValueError, match="3 non-finite steps in a row, the last at step 2"):  # all that there are
        fit(model, rows.batches(2, 2), dead, Schedule(3, 1e-3, 1e-4), run=str(tmp_path / "y"), stage="general")
    assert not checkpoints(tmp_path / "y", "general")


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda w: w.pop("norm.weight"), "tensor norm.weight has shape none, need (32,)"),
        (lambda w: w.update(extra=torch.ones(2)), "tensor extra has shape (2,), need none"),
        (lambda w: w.update({"norm.weight": torch.ones(3)}), "tensor norm.weight has shape (3,), need (32,)"),
        (lambda w: w["head.weight"][5].fill_(torch.nan), "tensor head.weight is not finite"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named(micro_model, tmp_path, change, message):
    path = str(tmp_path / "general" / "step_1.pt")
    save_checkpoint(path, micro_model, step=1)
    state = load_latest(tmp_path, "general")
    change(state["model"])
    with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")):
        load_model(state)


def test_a_log_is_only_written_anew_where_it_changes(tmp_path):
    """Another script may be appending to it; what it writes to a file that was replaced would be lost."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "dpo", "step": 0}\n{"stage": "otpo", "step": 0}\n')
    with open(path, "a", encoding="utf-8") as other:
        rewind_metrics(tmp_path, "reward/1", 0)
        other.write('{"stage": "otpo", "step": 1}\n')
    assert [(entry["stage"], entry["step"]) for entry in read_metrics(tmp_path)] == [("dpo", 0), ("otpo", 0), ("otpo", 1)]
    path.write_text(path.read_text() + '{"stage": "otpo", "st')  # torn by a kill: an entry behind it would be lost
    rewind_metrics(tmp_path, "otpo", 1)
    assert path.read_text() == '{"stage": "dpo", "step": 0}\n{"stage": "otpo", "step": 0}\n'


@pytest.mark.parametrize("line", (b"[1]", b'{"step": 3}', b"{,}", b"\xff"))
def test_a_damaged_log_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"stage": "dpo", "step": 0}\n' + line + b"\n")
    with pytest.raises(ValueError, match="metrics.jsonl:2: damaged, not a step of training"):
        read_metrics(tmp_path)


def test_a_batch_without_supervised_tokens_is_an_error(micro_config, rows, tmp_path):
    def empty(step):
        return [{**batch, "weights": batch["weights"] * 0} for batch in rows.batches(2, 2)(step)]

    with pytest.raises(ValueError, match="no supervised token"):
        fit(Compass(micro_config), empty, language_model_loss, Schedule(5, 1e-3, 1e-4), run=str(tmp_path), stage="general")


def test_multi_token_prediction_is_interleaved(micro_config, rows, tmp_path):
    model = Compass(dataclasses.replace(micro_config, mtp_depth=1))
    before = model.mtp[0].join.weight.clone()
    schedule = Schedule(4, 1e-3, 1e-3, mtp_every=0)
    fit(model, rows.batches(2, 2), language_model_loss, schedule, run=str(tmp_path), stage="long")
    assert all(e["mtp"] == 0 for e in read_metrics(tmp_path)) and torch.equal(model.mtp[0].join.weight, before)
    fit(model, rows.batches(2, 2), language_model_loss, schedule._replace(mtp_every=2), run=str(tmp_path), stage="mtp")
    assert [e["mtp"] > 0 for e in read_metrics(tmp_path) if e["stage"] == "mtp"] == [True, False, True, False]
    assert not torch.equal(model.mtp[0].join.weight, before)


def test_the_stages_of_v3_follow_each_other_and_sft_takes_the_last(script, micro_tokenizer, tmp_path):
    run, data = tmp_path / "run", tmp_path / "data"
    micro_tokenizer.save(run)
    data.mkdir()
    texts = (json.dumps({"text": f"{d['text']} {i}"}) for i, d in enumerate(market.documents("general", 0, per_language=20)))
    (data / "en.jsonl").write_text("\n".join(texts))
    result = script("train.py", "--config", "tiny_v3", "--run", run, "--data", data, "--steps", "1")
    assert result.returncode == 0, result.stderr
    stages = list(RECIPES["tiny_v3"])
    assert stages == ["general", "market", "reasoning", "extend", "long", "mtp"] and all(checkpoints(run, stage) for stage in stages)
    config = load_latest(run, "mtp")["config"]
    assert config["max_seq_len"] == 1024 and config["rope_base"] == 1e7 and config["mtp_depth"] == 1
    result = script("train.py", "--config", "tiny_v3", "--run", run, "--stage", "anneal")
    assert result.returncode == 2 and "--stage anneal is not one of general, market" in result.stderr
    (tmp_path / "tasks.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "a"}], "answer": "b"}))
    result = script("sft.py", "--run", run, "--stage", "sft1", "--steps", "1", "--data", tmp_path / "tasks.jsonl")
    assert "inherited from mtp step 1" in result.stdout, result.stderr


def test_router_collapse_warns(micro_config, rows, tmp_path):
    model = Compass(micro_config)
    with torch.no_grad():
        for block in model.blocks:
            block.feed_forward.router.weight.zero_()
    fit(model, rows.batches(2, 2), language_model_loss, Schedule(1, 1e-9, 1e-9), run=str(tmp_path), stage="general")
    assert "router collapse" in read_metrics(tmp_path)[0]["warning"]
    every = Compass(dataclasses.replace(micro_config, top_k=4))  # of 4 experts all are chosen: even, and no collapse
    fit(every, rows.batches(2, 2), language_model_loss, Schedule(1, 1e-9, 1e-9), run=str(tmp_path), stage="anneal")
    assert "warning" not in read_metrics(tmp_path)[1]


CHILD = """
import os, sys, torch
sys.path[:0] = ["tests", "."]
from compass import CompassConfig, Compass
from data import market
from tokenizer import Tokenizer
from train import Schedule, TokenRows, Tokenised, fit, language_model_loss
import json
config = CompassConfig(**json.loads(sys.argv[2]))
rows = TokenRows(Tokenised(market.documents("general", 3, per_language=5), Tokenizer.load(sys.argv[1])), 64, seed=1)
torch.manual_seed(0)
torch.set_num_threads(1)
plain, at, sends = rows.batches(4, 2), int(sys.argv[3]), int(sys.argv[4])
def batches(step):
    if step == at:
        os.kill(os.getpid(), sends)
    return plain(step)
fit(Compass(config), batches, language_model_loss, Schedule(60, 1e-3, 1e-4), run=sys.argv[1], stage="general", save_every=5, resume=True)
"""


def test_kill_and_sigterm_lose_nothing_saved(micro_config, micro_tokenizer, tmp_path):
    """SIGKILL as step 13 begins, SIGTERM as step 17 does, then the end: the curve equals an undisturbed one."""

    def start(run, step=-1, sends=0):
        micro_tokenizer.save(run)
        command = [sys.executable, "-c", CHILD, str(run), json.dumps(vars(micro_config)), str(step), str(int(sends))]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    disturbed = tmp_path / "disturbed"
    assert start(disturbed, 13, signal.SIGKILL).returncode == -signal.SIGKILL
    assert load_latest(disturbed, "general")["step"] == 10 and len(read_metrics(disturbed)) == 13
    stopped = start(disturbed, 17, signal.SIGTERM)
    assert stopped.returncode == 0 and load_latest(disturbed, "general")["step"] == 18, stopped.stderr
    halfway = {**load_latest(disturbed, "general"), "tokenizer_hash": micro_tokenizer.hash}
    with pytest.raises(ValueError, match="general was stopped at step 18 of 60: finish it with `python train.py` and --resume"):
        inherit(halfway, micro_tokenizer, to_train=True)
    inherit(halfway, micro_tokenizer)  # it may be looked at
    for run in (disturbed, tmp_path / "calm"):
        ended = start(run)
        assert ended.returncode == 0, ended.stderr
    curves = [[(e["step"], e["loss"]) for e in read_metrics(run)] for run in (disturbed, tmp_path / "calm")]
    assert curves[0] == curves[1] and len(curves[0]) == 60
    inherit({**load_latest(disturbed, "general"), "tokenizer_hash": micro_tokenizer.hash}, micro_tokenizer, to_train=True)
    a, b = (load_latest(run, "general")["model"] for run in (disturbed, tmp_path / "calm"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("a.jsonl", b'{"text": "fine"}\n{"text": \n', "a.jsonl:2: malformed JSON (Expecting value at column 11)"),
        ("a.jsonl", b'{"text": "fine"}\n' + b"[" * 100_000, "a.jsonl:2: malformed JSON (nested too deeply)"),
        ("a.jsonl", b'["text"]\n', "a.jsonl:1: expected a JSON object"),
        ("a.jsonl", b'{"text": ""}\n', 'a.jsonl:1: field "text" is missing or empty'),
        ("a.jsonl", b'{"text": "x", "lang": "xx"}\n', "a.jsonl:1: unknown language 'xx'"),
        ("a.jsonl", b'{"text": "x", "lang": ["en"]}\n', "a.jsonl:1: unknown language ['en']"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "half \\ud83d"}\n', "a.jsonl:2: malformed JSON (half of a surrogate pair stands alone)"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz: damaged gzip file"),
        ("a.txt", b"fine\n\xff\xfe\n", "a.txt:2: not UTF-8"),
        ("a.txt", b" \n", "data: all files are empty"),
        ("a.pdf", b"", "holds no file ending in .txt .jsonl"),
    ],
)
def test_bad_corpus_is_one_clear_message(script, tmp_path, name, content, message):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_bytes(content)
    result = script("tokenizer.py", "--data", tmp_path / "data", "--run", tmp_path / "run")
    assert result.returncode == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_missing_stages_and_folders_are_named_with_the_command(script, tmp_path, micro_tokenizer):
    run = tmp_path / "run"
    for args, message in (
        (("train.py", "--run", run), "run `python tokenizer.py"),
        (("tokenizer.py", "--data", tmp_path / "nowhere"), "no such folder"),
        (("generate.py", "--run", run), "tokenizer.tiktoken not found"),
        (("train.py", "--config", "huge"), "not one of tiny"),
        (("train.py", "--device", "cuda"), "sees no GPU"),
    ):
        result = script(*args)
        assert result.returncode == 2 and message in result.stderr, result.stderr
    micro_tokenizer.save(run)
    for args, message in (
        (("sft.py", "--run", run), "run `python train.py --stage long"),
        (("train.py", "--run", run, "--stage", "anneal"), "run `python train.py --run"),
        (("train.py", "--config", "tiny_v3", "--run", run, "--stage", "mtp"), "run `python train.py --stage long --run"),
        (("train.py", "--config", "tiny_v3", "--run", run, "--stage", "reasoning"), "run `python train.py --config tiny_v3 --stage market"),
        (("generate.py", "--run", run), "run `python train.py"),
        (("evaluate.py", "--run", run), "run `python train.py"),
    ):
        result = script(*args)
        assert result.returncode == 2 and message in result.stderr, result.stderr
    assert sorted(os.listdir(run)) == ["tokenizer.json", "tokenizer.tiktoken"]


def test_held_out_documents_are_disjoint_and_complete(tmp_path):
    lines = [json.dumps({"text": f"document {i}"}) for i in range(400)]
    (tmp_path / "en.jsonl").write_text("\n".join(lines))
    sides = [{d["text"] for d in reader.documents(str(tmp_path), "general", 0, split)} for split in ("train", "test")]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 400 and 5 < len(sides[1]) < 40
