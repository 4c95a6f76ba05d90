"""parallel.py and plan.py: every layout on gloo processes equals one process, shards load anywhere, faults, the plan by hand."""

import argparse
import atexit
import dataclasses
import glob
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT

import parallel
import plan
import resharding
import reward
import sft
from checkpoint import checkpoints, load_checkpoint, load_latest, read_metrics, save_checkpoint
from cli import InputError
from compass import CONFIGS, Compass, count_parameters, first_head
from data import market
from dpo import add_reference, dpo_objective
from otpo import otpo_objective
from parallel import Layout, Ranks, initialise, layout_of, packed_orders, parallelize, whole_of
from reward import Pairs, RewardModel, reward_loss
from train import RECIPES, Schedule, _train_step, fit, language_model_loss, make_optimizer

CPU = torch.device("cpu")
MICRO = dict(n_layers=2, dim=32, n_heads=4, n_kv_heads=2, head_dim=8, expert_dim=16, vocab_size=512, max_seq_len=64)
MODELS = {name: dataclasses.replace(CONFIGS[name], **MICRO) for name in ("tiny", "tiny_v3")}
MODELS["tiny_v3"].rope_base = 1e6
MODELS["deep_v3"] = dataclasses.replace(MODELS["tiny_v3"], mtp_depth=2, n_layers=5, vocab_size=496)
CASES = {  # world size -> [(model, layout, recompute)]
    2: [
        *((model, Layout(**{axis: 2}), False) for model in MODELS for axis in ("dp", "ep", "cp", "tp")),
        ("tiny", Layout(ep=2), True),
        ("tiny", Layout(pp=2), False),
        ("tiny_v3", Layout(pp=2), True),
        ("deep_v3", Layout(pp=2, vpp=2), True),
    ],
    4: [
        *((model, Layout(**dict.fromkeys(axes, 2)), False) for model in MODELS for axes in (("dp", "ep"), ("dp", "cp"), ("tp", "dp"))),
        ("tiny_v3", Layout(cp=2, ep=2), True),
        ("tiny", Layout(pp=2, ep=2), False),
        ("deep_v3", Layout(pp=2, dp=2), False),
        ("deep_v3", Layout(pp=2, ep=2, vpp=2), False),
        ("deep_v3", Layout(pp=2, cp=2), False),
        ("deep_v3", Layout(pp=2, tp=2), False),
    ],
}  # fmt: skip


def batch_of(config, seed, rows=5, T=32):
    """Random documents of uneven length, padding, targets that do not count; half the rows have few tokens, so few experts."""
    g = torch.Generator().manual_seed(seed)
    tokens, targets = (torch.randint(0, config.vocab_size, (rows, T), generator=g) for _ in range(2))
    tokens[: rows // 2] //= 100
    doc_ids = torch.rand(rows, T, generator=g).lt(0.15).long().cumsum(1)
    doc_ids[-1, -7:] = -1
    starts = torch.cat((torch.ones(rows, 1, dtype=torch.bool), doc_ids[:, 1:] != doc_ids[:, :-1]), 1)
    at = torch.arange(T).expand(rows, T)
    positions = at - torch.where(starts, at, 0).cummax(1).values
    weights = torch.rand(rows, T, generator=g).lt(0.6).float() * (doc_ids >= 0)
    weights[0] = 0  # with two ranks' rows cut unevenly, a row without targets still balances its experts
    domains = torch.randint(0, 2, (rows, T), generator=g)
    return dict(tokens=tokens, targets=targets, weights=weights, doc_ids=doc_ids, positions=positions, domains=domains)


def one_step(model):
    model.router_scale = 0.25  # of the aux and z loss, as late in a stage
    batches = [model.ranks.take(batch_of(model.config, seed)) for seed in (0, 1)]
    loss, norm, _, metrics = _train_step(model, make_optimizer(model), batches, sft.sft_loss, 1e-3, CPU)
    return loss, norm, metrics


def step_without_mtp(model):
    """(loss, norm) of a first step in which the MTP blocks rest."""
    model.mtp_scale = 0.0
    return one_step(model)[:2]


def pairs_of(config):
    """Pairs of uneven length, a number that no batch of the reference divides."""
    g = random.Random(0)
    sides = [[g.randrange(config.vocab_size) for _ in range(g.randint(8, 30))] for _ in range(22)]
    rows = [[(ids, [0] * 5 + [1] * (len(ids) - 5)) for ids in sides[2 * i : 2 * i + 2]] for i in range(11)]
    return Pairs(rows, {}, config.max_seq_len, 0)


OBJECTIVES = {"reward": reward_loss, "dpo": dpo_objective(0.5), "otpo": otpo_objective(0.5)}
JUDGING = [Layout(**{axis: 2}) for axis in ("dp", "ep", "tp")]


def one_preference_step(stage, model):
    """A step of tuning on pairs, against a reference that is another model: (loss, norm, the model that was trained)."""
    pairs = pairs_of(model.config)
    if stage == "reward":
        model = RewardModel(model)
    else:
        add_reference(pairs, model, rows=3)
        with torch.no_grad():  # away from the reference
            for p in model.parameters():
                p.mul_(0.9)
    batches = [model.ranks.take(batch) for batch in pairs.batch(0)]
    loss, norm, *_ = _train_step(model, make_optimizer(model), batches, OBJECTIVES[stage], 1e-3, CPU)
    return loss, norm, model


def fresh(name):
    torch.manual_seed(0)
    return Compass(MODELS[name])


@torch.no_grad()
def stages_of(name, ranks, recompute=False):
    model, weights = parallel.build(MODELS[name], ranks, CPU, recompute), fresh(name).state_dict()
    for key, p in model.named_parameters():
        p.copy_(parallel.sharded_like(weights[key], p, packed_orders(model).get(key)))
    return model


def whole(model, gradients=False):
    orders = packed_orders(model)
    tensors = {name: p.grad if gradients else p for name, p in model.named_parameters()}
    tensors = {name: x for name, x in tensors.items() if x is not None}  # a reward model's LM head has no gradient
    return {name: whole_of(x, orders.get(name)) for name, x in tensors.items()}


def train(model, run, steps, *, at=None, rank=None, sends=None, loss_fn=language_model_loss, **kwargs):
    """fit for some steps, saving every second one; one rank sends itself a signal when a certain step begins."""

    def batches(step):
        if step == at and dist.get_rank() == rank:
            os.kill(os.getpid(), sends)
        return [batch_of(model.config, 10 * step + m) for m in range(2)]

    schedule = Schedule(steps, 1e-2, 1e-3, 2)
    return fit(model, batches, loss_fn, schedule, run=str(run), stage="general", save_every=2, **kwargs)


def sick_on_the_last_rank(model, batch):
    """NaN in the gradient of one rank, in one micro-step."""
    loss, metrics = language_model_loss(model, batch)
    model.calls = getattr(model, "calls", 0) + 1
    return (loss * float("nan") if model.calls == 3 and dist.get_rank() == dist.get_world_size() - 1 else loss), metrics


def four_ranks(folder):
    """All layouts, a calm run, and one that ends when a rank is killed."""
    layouts(4, folder)
    ranks = Ranks(Layout(dp=2, tp=2), "cpu")
    train(parallelize(fresh("tiny"), ranks), f"{folder}/calm", 4)
    train(parallelize(fresh("tiny"), ranks), f"{folder}/killed", 4, at=3, rank=random.Random(0).randrange(4),
          sends=signal.SIGKILL)  # fmt: skip


def four_ranks_again(folder):
    ranks = Ranks(Layout(dp=2, tp=2), "cpu")
    with pytest.raises(SystemExit):  # all ranks save and go when one is asked to
        train(parallelize(fresh("tiny"), ranks), f"{folder}/killed", 4, resume=True, at=2, rank=1, sends=signal.SIGTERM)
    if dist.get_rank() == 0:
        torch.save([os.path.basename(path) for path in checkpoints(f"{folder}/killed", "general")], f"{folder}/asked.pt")
        torn = shutil.copytree(f"{folder}/killed/general/step_2.pt", f"{folder}/killed/general/step_4.pt")
        os.truncate(sorted(glob.glob(f"{torn}/*.distcp"))[-1], 100)  # one rank sees it, all pass over it, and write it anew
    dist.barrier()
    train(parallelize(fresh("tiny"), ranks), f"{folder}/killed", 4, resume=True)
    model = train(parallelize(fresh("tiny"), ranks), f"{folder}/sick", 3, loss_fn=sick_on_the_last_rank)
    torch.save(whole(model), f"{folder}/sick.pt")


def two_ranks(folder):
    layouts(2, folder)
    for layout in JUDGING:
        for stage in OBJECTIVES:
            loss, norm, model = one_preference_step(stage, parallelize(fresh("tiny"), Ranks(layout, "cpu")))
            torch.save((loss, norm, whole(model, gradients=True)), f"{folder}/{dist.get_rank()}-{stage}-{tuple(layout)}.pt")
    moe = parallelize(fresh("tiny"), Ranks(Layout(ep=2), "cpu")).blocks[0].feed_forward
    arrived = moe.experts(torch.ones(16, 32), torch.ones(16, dtype=torch.int64))
    assert type(arrived) is torch.Tensor  # not one still on its way, whose memory a Triton kernel must not read
    if dist.get_rank() == 0:
        for name, origin in (("two", "calm"), ("stages", "calm"), ("of a file", "file")):
            shutil.copytree(f"{folder}/{origin}", f"{folder}/{name}")
    dist.barrier()
    train(parallel.build(MODELS["tiny"], Ranks(Layout(pp=2), "cpu"), CPU, False), f"{folder}/stages", 6, resume=True)
    torch.save(whole(train(parallelize(fresh("tiny"), Ranks(Layout(ep=2), "cpu")), f"{folder}/two", 6, resume=True)), f"{folder}/two.pt")
    model = train(parallelize(fresh("tiny"), Ranks(Layout(tp=2), "cpu")), f"{folder}/of a file", 6, resume=True)
    torch.save(whole(model), f"{folder}/of a file.pt")
    torch.save(full_disk(folder), f"{folder}/full{dist.get_rank()}.pt")
    torch.save(rows_that_do_not_fit(), f"{folder}/rows.pt")
    halves = [Layout(**{axis: 2}) for axis in ("ep", "tp", "pp")]
    seeded = [whole(initialise(parallel.build(MODELS["tiny"], Ranks(layout, "cpu"), CPU, False), 7)) for layout in halves]
    torch.save(seeded, f"{folder}/seeded{dist.get_rank()}.pt")


def full_disk(folder):
    """What save_shards says when the second rank's files may not grow, and what is left of its folder."""
    model = parallelize(fresh("tiny"), Ranks(Layout(dp=2), "cpu"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    with pytest.raises(ValueError) as caught:
        resharding.save_shards(f"{folder}/full/general/step_1.pt", model, make_optimizer(model), step=1, stage="general")
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    dist.barrier()
    return str(caught.value), os.listdir(f"{folder}/full/general")


def rows_that_do_not_fit():
    """What a pipeline says to too few rows, and interleaved stages to five, which torch cannot run in equal rounds."""
    messages = []
    for layout, rows in ((Layout(pp=2), 1), (Layout(pp=2, vpp=2), 5)):
        with pytest.raises(InputError) as caught:
            stages_of("deep_v3", Ranks(layout, "cpu")).schedule(rows, 32, 1, CPU)
        messages.append(str(caught.value))
    return messages


def layouts(world, folder):
    for name, layout, recompute in CASES[world]:
        ranks = Ranks(layout, "cpu")
        model = stages_of(name, ranks, recompute) if layout.pp > 1 else parallelize(fresh(name), ranks, recompute=recompute)
        loss, norm, metrics = one_step(model)
        result = loss, norm, metrics, whole(model, gradients=True), whole(model)
        if layout.pp > 1:
            result = *result, step_without_mtp(stages_of(name, ranks, recompute))
        torch.save(result, f"{folder}/{world}-{dist.get_rank()}-{name}-{tuple(layout)}.pt")


def rank_main(rank, world, folder, work):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{work.__name__}", rank=rank, world_size=world)
    work(folder)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the ranks left behind."""
    folder = str(tmp_path_factory.mktemp("ranks"))
    os.environ["PYTHONPATH"] = os.pathsep.join((ROOT, os.path.join(ROOT, "tests")))
    multiprocessing.set_forkserver_preload(["test_parallel"])  # the imports are paid once

    def spawn(world, work):
        torch.multiprocessing.start_processes(rank_main, (world, folder, work), nprocs=world, start_method="forkserver")

    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        spawn(4, four_ranks)
    spawn(4, four_ranks_again)
    train(fresh("tiny"), f"{folder}/file", 4)
    spawn(2, two_ranks)
    return folder


@pytest.mark.parametrize("world,name,layout,recompute", [(world, *case) for world, cases in CASES.items() for case in cases])
def test_every_layout_equals_one_process(folder, world, name, layout, recompute):
    model = fresh(name)
    loss, norm, metrics = one_step(model)
    seen = set()
    for rank in range(world):
        their_loss, their_norm, their_metrics, gradients, weights, *after = torch.load(f"{folder}/{world}-{rank}-{name}-{tuple(layout)}.pt")
        assert their_loss == pytest.approx(loss, rel=1e-5) and their_norm == pytest.approx(norm, rel=1e-5)
        for key, value in metrics.items():
            torch.testing.assert_close(torch.tensor(their_metrics[key]), torch.tensor(value), rtol=1e-5, atol=1e-6, msg=key)
        ours = dict(model.named_parameters())
        for key in gradients:
            torch.testing.assert_close(gradients[key], ours[key].grad, rtol=1e-5, atol=1e-6, msg=key)
            moved = ours[key].grad.abs() > 1e-8  # below AdamW's eps its first step is made of the gradient's rounding
            torch.testing.assert_close(weights[key][moved], ours[key][moved], rtol=1e-4, atol=2e-5, msg=key)
        seen.update(gradients)
    assert seen == ours.keys()  # the stages of a pipeline together
    if after:
        assert after == [pytest.approx(step_without_mtp(fresh(name)), rel=1e-5)]


@pytest.mark.parametrize("layout", JUDGING, ids=str)
@pytest.mark.parametrize("stage", OBJECTIVES)
def test_preferences_on_two_ranks_equal_one_process(folder, stage, layout):
    loss, norm, model = one_preference_step(stage, fresh("tiny"))
    ours = dict(model.named_parameters())
    for rank in range(2):
        their_loss, their_norm, gradients = torch.load(f"{folder}/{rank}-{stage}-{tuple(layout)}.pt")
        assert their_loss == pytest.approx(loss, rel=1e-5) and their_norm == pytest.approx(norm, rel=1e-5)
        trained = {name for name, p in ours.items() if p.grad is not None}
        assert trained <= gradients.keys() and len(trained) > 20
        for key in trained:
            torch.testing.assert_close(gradients[key], ours[key].grad, rtol=1e-5, atol=1e-6, msg=key)


def curve(run):
    return [(entry["step"], entry["loss"]) for entry in read_metrics(run)]


def test_a_killed_rank_a_sigterm_and_restarts_change_nothing(folder, tmp_path):
    assert torch.load(f"{folder}/asked.pt") == ["step_3.pt", "step_2.pt"]
    assert [step for step, _ in curve(f"{folder}/calm")] == [0, 1, 2, 3]
    assert curve(f"{folder}/killed") == curve(f"{folder}/calm")
    a, b = (load_latest(f"{folder}/{run}", "general")["model"] for run in ("killed", "calm"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    train(fresh("tiny"), tmp_path, 4)
    assert [loss for _, loss in curve(tmp_path)] == pytest.approx([loss for _, loss in curve(f"{folder}/calm")], rel=1e-4)


def test_shards_of_four_ranks_load_on_two_and_on_one(folder, tmp_path):
    """Written with dp x tp; ep=2, a pipeline of two (which writes shards itself) and a single process go on to the same weights."""
    state = load_checkpoint(f"{folder}/calm/general/step_4.pt")
    assert state["step"] == 4 and state["config"] == dataclasses.asdict(MODELS["tiny"])
    shutil.copytree(f"{folder}/calm", tmp_path / "one")
    alone = train(fresh("tiny"), tmp_path / "one", 6, resume=True)
    two, stages = torch.load(f"{folder}/two.pt"), load_latest(f"{folder}/stages", "general")["model"]
    for name, p in alone.named_parameters():
        torch.testing.assert_close(two[name], p, rtol=1e-4, atol=5e-5, msg=name)
        torch.testing.assert_close(stages[name], p, rtol=1e-4, atol=5e-5, msg=name)
    assert [step for step, _ in curve(f"{folder}/two")] == list(range(6))


def test_many_ranks_go_on_from_the_file_of_one_process(folder, tmp_path):
    shutil.copytree(f"{folder}/file", tmp_path / "alone")
    alone, two = train(fresh("tiny"), tmp_path / "alone", 6, resume=True), torch.load(f"{folder}/of a file.pt")
    for name, p in alone.named_parameters():
        torch.testing.assert_close(two[name], p, rtol=1e-4, atol=5e-5, msg=name)
    assert curve(f"{folder}/of a file") == [(step, pytest.approx(loss, rel=1e-4)) for step, loss in curve(tmp_path / "alone")]


def test_torn_shards_are_named_and_the_ones_before_them_used(folder, tmp_path, capsys):
    run = shutil.copytree(f"{folder}/calm", tmp_path / "torn")
    newest, older = checkpoints(run, "general")
    part = os.path.join(newest, sorted(json.load(open(os.path.join(newest, "manifest.json")))["files"])[-1])
    content = open(part, "rb").read()
    open(part, "wb").write(content[: len(content) // 2])
    with pytest.raises(ValueError, match="step_4.pt is torn or foreign: the checksum of __.*distcp"):
        load_checkpoint(newest)
    assert load_latest(run, "general")["step"] == 2 and "trying the one before it" in capsys.readouterr().out
    assert load_latest(run, "general", weights=False)["step"] == 2  # so that --resume does not call the stage finished
    open(os.path.join(older, "manifest.json"), "w").write("{}")
    with pytest.raises(ValueError, match="step_2.pt is torn or foreign: its manifest.json"):
        load_checkpoint(older)
    os.remove(os.path.join(older, "manifest.json"))
    with pytest.raises(ValueError, match="holds no intact checkpoint"):
        load_latest(run, "general")
    os.mkdir(f"{newest}.tmp")  # of many ranks that were killed while they saved
    save_checkpoint(newest, fresh("tiny"), step=4)  # by one process, over what is left of the shards
    os.rename(f"{run}/general", f"{run}/renamed")
    state = load_latest(run, "renamed")
    assert state["step"] == 4 and state["stage"] == "renamed"


def test_a_full_disk_leaves_no_checkpoint_behind(folder):
    for rank in range(2):
        message, left = torch.load(f"{folder}/full{rank}.pt")
        assert "step_1.pt: could not be written" in message and "earlier checkpoints are intact" in message and left == []


def test_rows_that_make_no_micro_batches_are_named(folder):
    few, five = torch.load(f"{folder}/rows.pt")
    assert "have [1] rows a step" in few and "have [5] rows a step" in five and "micro-batches of one shape" in five


def test_a_non_finite_gradient_of_one_rank_skips_the_step_on_all(folder):
    entries = read_metrics(f"{folder}/sick")
    assert [entry["step"] for entry in entries if "skipped" in entry] == [1] and len(entries) == 3
    assert all(value.isfinite().all() for value in torch.load(f"{folder}/sick.pt").values())


def test_first_weights_do_not_depend_on_the_layout(folder):
    by_ep, by_tp, first = torch.load(f"{folder}/seeded0.pt")
    *_, second = torch.load(f"{folder}/seeded1.pt")
    assert by_ep.keys() == by_tp.keys() == {**first, **second}.keys() and not first.keys() & second.keys()
    assert all(torch.equal(by_ep[name], x[name]) for x in (by_tp, first, second) for name in x)
    assert torch.equal(by_ep["head.weight"], first_head(by_ep["embedding.weight"]))
    width = by_ep["blocks.0.attention.qkv.weight"].std().item() * MODELS["tiny"].dim ** 0.5
    assert width == pytest.approx(1, abs=0.1) and by_ep["norm.weight"].eq(1).all()


def test_two_processes_pretrain_and_tune_and_one_reads_the_result(script, micro_tokenizer, tmp_path):
    run, data, tasks = tmp_path / "run", tmp_path / "data", tmp_path / "tasks.jsonl"
    micro_tokenizer.save(run)
    data.mkdir()
    texts = (json.dumps({"text": f"{d['text']} {i}"}) for i, d in enumerate(market.documents("general", 0, per_language=20)))
    (data / "en.jsonl").write_text("\n".join(texts))
    tasks.write_text("\n".join(json.dumps({"messages": [{"role": "user", "content": f"{i}"}], "answer": "b"}) for i in range(400)))
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--")
    result = script(*torchrun, "train.py", "--run", run, "--data", data, "--steps", "2", "--parallel", "ep=2")
    assert result.returncode == 0 and "2 processes: pp=1, dp=1, cp=1, ep=2, tp=1" in result.stdout, result.stderr
    result = script(*torchrun, "sft.py", "--run", run, "--data", tasks, "--stage", "sft1", "--steps", "2", "--parallel", "pp=2")
    assert result.returncode == 0 and result.stdout.count("inherited from long step 2") == 1, result.stderr
    assert os.path.isdir(run / "sft1" / "step_2.pt") and curve(run)[-1][0] == 1
    pairs = tmp_path / "pairs.jsonl"
    pair = {"messages": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}
    pairs.write_text("\n".join([json.dumps(pair)] * 9))
    preferences = ("--run", run, "--data", pairs, "--steps", "1")
    result = script(*torchrun, "reward.py", *preferences, "--parallel", "ep=2")
    assert result.returncode == 0 and result.stdout.count("4 members trained; python reward.py") == 1, result.stderr
    result = script("reward.py", "--run", run, "--data", pairs, "--resume")  # for as many steps as the ranks had begun with
    assert result.returncode == 0 and result.stdout.count("already finished") == 4, result.stderr
    assert os.path.isfile(run / "reward" / "step_1.pt")
    result = script(*torchrun, "otpo.py", *preferences, "--parallel", "tp=2")
    assert result.returncode == 0 and curve(run)[-1] == (0, pytest.approx(0.693, abs=1e-3)), result.stderr
    result = script("checkpoint.py", "--run", run)  # four stages and otpo in shards, the reward models' members too; their average
    assert result.stdout.count("intact, seed 0") == 10 and "training order: otpo" in result.stdout and not result.stderr, result.stderr


@pytest.mark.parametrize("axis", ["pp", "cp"])
def test_preferences_need_whole_rows(axis, micro_model, micro_tokenizer, tmp_path, monkeypatch):
    micro_tokenizer.save(tmp_path)
    save_checkpoint(str(tmp_path / "sft1" / "step_1.pt"), micro_model, step=1, stage="sft1", tokenizer_hash=micro_tokenizer.hash)
    args = argparse.Namespace(run=str(tmp_path), parallel=f"{axis}=2")
    monkeypatch.setattr(reward, "processes", lambda args, config_of: (CPU, argparse.Namespace(layout=Layout(**{axis: 2}))))
    with pytest.raises(ValueError, match=f"{axis}=2: preferences are trained with dp, ep and tp"):
        reward.processes_with_whole_rows(args)
    monkeypatch.setattr(reward, "processes", lambda args, config_of: (CPU, None))
    save_checkpoint(str(tmp_path / "drills" / "step_2.pt"), micro_model, step=2, stage="drills", tokenizer_hash=micro_tokenizer.hash)
    device, ranks, _, state = reward.processes_with_whole_rows(args)
    assert device == CPU and ranks is None and (state["stage"], state["step"]) == ("drills", 2)  # the last stage of tuning


@pytest.mark.parametrize(
    "text,world,message",
    [
        ("ep=2,xp=2", 4, "'xp=2' is not one of pp, dp, cp, ep, tp"),
        ("ep=two", 4, "'ep=two' is not one of"),
        ("ep=²", 4, "'ep=²' is not one of"),
        ("tp=2,tp=4", 8, "'tp=4' is not one of pp, dp, cp, ep, tp, vpp, named once"),
        ("ep=4", 6, "ep=4 does not make 6 processes"),
        ("dp=2,ep=2", 8, "dp=2 x ep=2 does not make 8 processes"),
        ("pp=2,vpp=2", 3, "vpp=2: pp=2 does not make 3 processes"),
        ("ep=3", 3, "ep=3 must divide n_experts, which is 16"),
        ("tp=8", 8, "tp=8 must divide n_kv_heads, which is 4"),
        ("", 3, "dp x cp = 3 must divide dim, which is 128"),
        ("vpp=2", 2, "vpp=2 cuts a pipeline's stages into runs of layers: name pp, too"),
        ("pp=2,vpp=2", 2, "pp x vpp = 4 is more than n_layers, which is 3"),
    ],
)
def test_layouts_that_cannot_be_are_named(text, world, message):
    with pytest.raises(ValueError, match=message):
        layout_of(text, world, CONFIGS["tiny"])


def test_tensor_parallelism_divides_the_dense_block_of_mtp():
    config = dataclasses.replace(CONFIGS["tiny_v3"], n_heads=6, n_kv_heads=3, n_shared=3, expert_dim=64, dim=48)
    with pytest.raises(ValueError, match=r"tp=3 must divide \(top_k \+ n_shared\) \* expert_dim, which is 320"):
        layout_of("tp=3", 3, config)
    assert layout_of("tp=3", 3, dataclasses.replace(config, mtp_depth=0)).tp == 3


def test_batches_that_cannot_be_spread_or_cut_are_named():
    ranks = argparse.Namespace(count=4, index=3, layout=Layout(cp=2))
    pair_of_rows = {"weights": torch.zeros(4, 2), "tokens": torch.arange(8).view(8, 1)}
    assert Ranks.take(ranks, pair_of_rows)["tokens"].flatten().tolist() == [3, 7]
    with pytest.raises(InputError, match="a batch of 3 rows cannot be spread over 4 ranks"):
        Ranks.take(ranks, {"weights": torch.zeros(3, 2)})
    assert Ranks.order(ranks, 8, "cpu").tolist() == [[0, 1, 6, 7], [2, 3, 4, 5]]
    with pytest.raises(InputError, match="a row of 6 tokens cannot be cut into 2 x cp = 4 equal parts"):
        Ranks.order(ranks, 6, "cpu")


def test_parallel_without_torchrun_says_how_to_start(script, tmp_path):
    result = script("train.py", "--run", tmp_path, "--parallel", "ep=2")
    assert result.returncode == 2 and "torchrun --nproc-per-node N -- train.py --parallel ep=2" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_thread_that_waits_for_the_gil_has_it_before_the_process_ends(monkeypatch):
    """A thread of Python in place of one of gloo, which would abort the process if it had to wait for ever."""
    for name, value in dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0").items():
        monkeypatch.setenv(name, value)
    at_exit, had_it = [], threading.Event()
    monkeypatch.setattr(atexit, "register", lambda *call: at_exit.append(call))
    parallel.start("", lambda: CONFIGS["tiny"], "cpu")
    dist.destroy_process_group()
    thread, interval = threading.Thread(target=lambda: (time.sleep(0.05), had_it.set())), sys.getswitchinterval()
    sys.setswitchinterval(1000)  # none has to give the GIL away
    try:
        thread.start()
        end = time.monotonic() + 0.2
        while time.monotonic() < end:
            assert not had_it.is_set()
        for function, *args in at_exit:
            function(*args)
        assert had_it.is_set()
    finally:
        sys.setswitchinterval(interval)
        thread.join()


def test_more_processes_than_gpus_are_refused_by_all(monkeypatch):
    """By the first one, too, which alone is heard (cli.run)."""
    for name, value in dict(RANK="0", LOCAL_RANK="0", LOCAL_WORLD_SIZE="8", WORLD_SIZE="8").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(InputError, match="8 processes on a node, and torch sees 4 GPUs"):
        parallel.start("ep=2", lambda: None, "cuda")


def test_the_way_to_start_names_the_script(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/sft.py"])
    with pytest.raises(InputError, match="torchrun --nproc-per-node N -- sft.py --parallel ep=2"):
        parallel.start("ep=2", CONFIGS["tiny"], "cpu")


def test_one_row_of_the_plan_by_hand():
    """v2_30b on 64 GPUs with ep=8: two rows of 4096 tokens a GPU."""
    config, layout = CONFIGS["v2_30b"], layout_of("ep=8", 64, CONFIGS["v2_30b"])
    rows = plan.formula(config, layout, 2, 4096)
    assert layout == Layout(dp=8, ep=8)
    # 30.13 billion weights of 4 bytes over 64 GPUs, as many gradients, two moments
    assert rows["parameters"] == pytest.approx(4 * count_parameters(config)[0] / 64, rel=1e-3)
    assert rows["optimizer"] == 2 * rows["gradients"] == 2 * rows["parameters"]
    # 30 layers x (there, back) x (forward, recomputed, backward) x 8192 tokens x 4 experts x 3072 numbers of 2 bytes, 7/8 of it to others
    assert rows["all_to_all, node"] == 30 * 6 * 8192 * 4 * 3072 * 2 * 7 // 8 and "all_to_all, network" not in rows
    # gradients in fp32: of what a GPU receives, the other seven nodes' part comes over the network once a node, shared by its 8 cards;
    # experts are summed over the 8 GPUs, one a node, that hold the same six
    experts = 30 * 48 * 3 * 3072 * 2048 // 8
    dense = count_parameters(config)[0] - 8 * experts
    assert rows["reduce_scatter, network"] == pytest.approx(4 * (dense * 56 / 64 / 8 + experts * 7 / 8))
    # attention, shared, router, four experts: 2 FLOPs x (forward, again, two in backward), but the last product only thrice; then the head
    attention = 9 * 3072 * 4096  # of one layer: 2 products, again, and 5 in backward, half of each masked
    by_hand = 8 * (23.6e6 + 37.7e6 + 0.15e6 + 75.5e6) - 25.2e6 + attention
    assert rows["FLOPs"] == pytest.approx(8192 * (30 * by_hand + 6 * 553e6), rel=1e-3)


@pytest.mark.parametrize(
    "name,layout,rows,T,imbalance",
    [
        ("v2_30b", Layout(dp=8, ep=8), 3, 4096, 1.5), ("v3_245b", Layout(dp=8, cp=8, ep=8), 1, 131_072, 1.0),
        ("small", Layout(dp=16, ep=3), 5, 2048, 1.0),  # rows that three do not divide, groups that no node holds evenly
    ],
)  # fmt: skip
def test_tracker_and_formula_agree(name, layout, rows, T, imbalance):
    """Two layers of the full width: every row within a percent (the plan itself allows five)."""
    config = dataclasses.replace(CONFIGS[name], n_layers=2)
    counted, by_hand = plan.tracked(config, layout, rows, T, imbalance), plan.formula(config, layout, rows, T, imbalance)
    assert counted.keys() == by_hand.keys() and by_hand["peak"] > (1e9 if name == "small" else 5e9)
    for row, value in counted.items():
        assert by_hand[row] == pytest.approx(value, rel=0.01), row


def test_the_plan_of_a_small_model_whose_peak_is_in_the_loss():
    plan.checked(CONFIGS["tiny_v3"], Layout(ep=8), 8, 256, 1.0)  # within five per cent, or it raises


def test_the_time_of_a_step_by_hand():
    """5,760 rows on 64 GPUs with 6 rows each: 15 micro-steps; active weights without the embedding, and causal attention."""
    config, layout = CONFIGS["v2_30b"], Layout(dp=8, ep=8)
    flops = 6 * (count_parameters(config)[1] - config.vocab_size * config.dim) + 6 * 30 * 24 * 128 * 4096
    assert plan.model_flops(config, 4096) == pytest.approx(flops, rel=1e-3)
    micro_steps, seconds, *_ = plan.step_time(config, layout, RECIPES["v2_30b"]["general"], 6, 0.35)
    assert micro_steps == 15 and seconds == pytest.approx(5760 * 4096 * flops / (64 * 989e12 * 0.35), rel=1e-3)
    assert plan.step_time(config, layout, RECIPES["v2_30b"]["general"], 7, 0.35)[0] == 13  # the last is not full
    with pytest.raises(InputError, match="--mfu is 0.0"):
        plan.report(argparse.Namespace(config="v2_30b", stage="general", gpus=64, mfu=0.0))
    with pytest.raises(InputError, match="--imbalance is 0.5"):
        plan.report(argparse.Namespace(config="v2_30b", stage="general", gpus=64, mfu=0.4, imbalance=0.5))
    args = dict(config="tiny", stage="general", gpus=16, mfu=0.4, rows=None)
    for layout in ("ep=1", "pp=2,ep=2"):
        with pytest.raises(InputError, match="--imbalance is of expert ranks"):
            plan.report(argparse.Namespace(**args, imbalance=2.0, parallel=layout))
    with pytest.raises(InputError, match="8 rows a step leave dp x ep = 8 ranks fewer micro-batches than 2 pipeline stages"):
        plan.report(argparse.Namespace(**args, imbalance=1.0, parallel="pp=2"))


def test_the_plan_is_printed_and_a_gap_is_an_error(monkeypatch, capsys):
    args = argparse.Namespace(config="v2_30b", stage="general", gpus=64, mfu=0.35, imbalance=1.0, rows=None, parallel=None)
    monkeypatch.setattr(plan, "tracked", plan.formula)
    plan.report(args)
    printed = capsys.readouterr().out
    assert "dp=8, cp=1, ep=8, tp=1, vpp=1: 6 rows" in printed and "a step: 15 micro-steps" in printed and "fragmentation: fits" in printed
    monkeypatch.setattr(plan, "tracked", lambda *rest: {row: 1.06 * value for row, value in plan.formula(*rest).items()})
    with pytest.raises(InputError, match=r"tracker and formula are 5.7 % apart, more than 5 %"):
        plan.report(args)


def test_full_sizes_fit_and_what_does_not_gets_advice():
    for name, gpus in (("v2_30b", 64), ("v3_245b", 512)):
        for recipe in RECIPES[name].values():
            layout = layout_of(plan.LAYOUTS.get((name, recipe.seq_len), "ep=8"), gpus, CONFIGS[name])
            assert plan.formula(CONFIGS[name], layout, recipe.micro_rows, recipe.seq_len)["peak"] < 0.9 * 80e9
            assert recipe.rows % (recipe.micro_rows * layout.dp * layout.ep) % (layout.dp * layout.ep) == 0  # the last micro-step, too
    config = CONFIGS["v3_245b"]
    assert plan.formula(config, layout_of("ep=8", 512, config), 1, 131_072)["peak"] > 80e9
    longest = RECIPES["v3_245b"]["long"]._replace(seq_len=131_072)
    assert plan.advice(config, longest, 512, 1).startswith("--parallel ep=8,cp=")
    assert "take more GPUs" in plan.advice(config, longest, 16, 1)
    general = RECIPES["v2_30b"]["general"]
    assert plan.advice(CONFIGS["v2_30b"], general, 64, 24, 6.0) != plan.advice(CONFIGS["v2_30b"], general, 64, 24)
    assert plan.advice(CONFIGS["small"], RECIPES["small"]["general"], 4, 4).startswith("--parallel ep=4,cp=1 ")


def test_what_the_plan_advises_it_does_not_refuse():
    """v2_30b's long stage with 9 rows a GPU: one row of ep=8,cp=1 would fit, but leaves ranks of the last micro-step without rows."""
    config, recipe = CONFIGS["v2_30b"], RECIPES["v2_30b"]["long"]
    advised = re.match(r"--parallel (\S+) with --rows (\d+) fits", plan.advice(config, recipe, 64, 9))
    layout = layout_of(advised[1], 64, config)
    plan.refuse_uneven(recipe.rows, layout, int(advised[2]))
    with pytest.raises(InputError, match="48 rows for dp x ep = 64"):
        plan.refuse_uneven(recipe.rows, layout_of("ep=8,cp=1", 64, config), 1)


def test_the_plan_of_a_pipeline_names_its_chunks(capsys):
    config = CONFIGS["v2_30b"]
    plan.pipeline_table(config, layout_of("pp=2,vpp=4,ep=8", 64, config), RECIPES["v2_30b"]["general"], 6)
    printed = capsys.readouterr().out.splitlines()
    # 5,760 rows over 32 data ranks, 6 at a time; a micro-batch keeps 6 x 4096 x 3072 x 2 bytes for each of 15 layers
    assert printed[1].startswith("pipeline of 2 stages, 30 micro-steps")
    assert [" ".join(line.split()) for line in printed[2:4]] == ["1F1B 3.23 % 4.5 2.3", "interleaved, 4 chunks 0.83 % 5.1 4.0"]
    plan.pipeline_table(CONFIGS["tiny"], layout_of("pp=2", 4, CONFIGS["tiny"]), RECIPES["tiny"]["general"], 1)
    assert "interleaved" not in capsys.readouterr().out  # three layers make no four chunks
