"""parallel.py and plan.py: every layout on gloo processes equals one process, shards load anywhere, faults, the plan by hand."""

import copy
import dataclasses
import json
import math
import multiprocessing
import os
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT

import parallel
import plan
from checkpoint import checkpoints, load_checkpoint, load_latest, read_metrics
from compass import CONFIGS, Compass, count_parameters
from parallel import Layout, Ranks, initialise, layout_of, packed_orders, parallelize, restore, restore_latest, save_shards, whole_of
from train import Schedule, _train_step, fit, language_model_loss, make_optimizer

CPU = torch.device("cpu")
MICRO = dict(n_layers=2, dim=32, n_heads=4, n_kv_heads=2, head_dim=8, expert_dim=16, vocab_size=512, max_seq_len=64)
MODELS = {"tiny": dataclasses.replace(CONFIGS["tiny"], **MICRO), "tiny_v3": dataclasses.replace(CONFIGS["tiny_v3"], **MICRO)}
CASES = {  # world size -> [(model, layout, recompute)]
    2: [
        *((model, Layout(**{axis: 2}), False) for model in MODELS for axis in ("dp", "ep", "cp", "tp")),
        ("tiny", Layout(ep=2), True),
    ],
    4: [
        *((model, Layout(**dict.fromkeys(axes, 2)), False) for model in MODELS for axes in (("dp", "ep"), ("dp", "cp"), ("tp", "dp"))),
        ("tiny_v3", Layout(cp=2, ep=2), True),
        ("tiny", Layout(ep=4), False),
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
    return dict(tokens=tokens, targets=targets, weights=weights, doc_ids=doc_ids, positions=positions)


def one_step(model):
    batches = [model.ranks.take(batch_of(model.config, seed)) for seed in (0, 1)]
    loss, norm, _, metrics = _train_step(model, make_optimizer(model), batches, language_model_loss, 1e-3, CPU)
    return loss, norm, metrics


def fresh(name):
    torch.manual_seed(0)
    return Compass(MODELS[name])


def whole(model, gradients=False):
    orders = packed_orders(model)
    return {name: whole_of(p.grad if gradients else p, orders.get(name)) for name, p in model.named_parameters()}


def batches_of(config, sick=None):
    return lambda step: [batch_of(config, 10 * step + m, rows=4) for m in range(2)]


def train(model, run, steps, **kwargs):
    """`steps` steps of fit; dies without saving in step `die`."""
    die = kwargs.pop("die", None)
    batches = batches_of(model.config)

    def until(step):
        if step == die:
            raise InterruptedError
        return batches(step)

    try:
        fit(model, until, kwargs.pop("loss_fn", language_model_loss), Schedule(steps, 1e-2, 1e-3, 2), run=str(run), stage="general",
            save_every=2, **kwargs)  # fmt: skip
    except InterruptedError:
        pass
    return model


def sick_on_the_last_rank(model, batch):
    """NaN in the gradient of one rank at one step."""
    loss, metrics = language_model_loss(model, batch)
    model.calls = getattr(model, "calls", 0) + 1
    return (loss * float("nan") if model.calls == 3 and dist.get_rank() == dist.get_world_size() - 1 else loss), metrics


def of_many(world, folder):
    """What the ranks of a world do; `one` compares."""
    for name, layout, recompute in CASES[world]:
        model = parallelize(fresh(name), Ranks(layout, "cpu"), recompute=recompute)
        loss, norm, metrics = one_step(model)
        result = loss, norm, metrics, whole(model, gradients=True), whole(model)
        torch.save(result, f"{folder}/{world}-{dist.get_rank()}-{name}-{tuple(layout)}.pt")
    if world == 4:
        ranks = Ranks(Layout(dp=2, tp=2), "cpu")
        train(parallelize(fresh("tiny"), ranks), f"{folder}/four", 4)
        train(parallelize(fresh("tiny"), ranks), f"{folder}/killed", 4, die=3)
        train(parallelize(fresh("tiny"), ranks), f"{folder}/killed", 4, resume=True)
        model = train(parallelize(fresh("tiny"), ranks), f"{folder}/sick", 3, loss_fn=sick_on_the_last_rank)
        torch.save(all(p.isfinite().all() for p in whole(model).values()), f"{folder}/finite.pt")
    else:
        ranks = Ranks(Layout(ep=2), "cpu")
        dist.barrier()
        model = train(parallelize(fresh("tiny"), ranks), f"{folder}/four", 6, resume=True)
        torch.save(whole(model), f"{folder}/two.pt")
        seeded = initialise(parallel.build(MODELS["tiny"], ranks, CPU, False), 7), initialise(
            parallel.build(MODELS["tiny"], Ranks(Layout(tp=2), "cpu"), CPU, False), 7
        )
        torch.save([whole(model) for model in seeded], f"{folder}/seeded.pt")


def rank_main(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
    of_many(world, folder)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Everything the ranks leave behind, world of four first."""
    folder = tmp_path_factory.mktemp("ranks")
    for world in (4, 2):
        if world == 2:  # the four have saved step 4 of 4; two go on to 6
            pass
        torch.multiprocessing.spawn(rank_main, (world, str(folder)), nprocs=world)
    return folder


@pytest.mark.parametrize("world,name,layout,recompute", [(world, *case) for world, cases in CASES.items() for case in cases])
def test_every_layout_equals_one_process(folder, world, name, layout, recompute):
    model = fresh(name)
    loss, norm, metrics = one_step(model)
    for rank in range(world):
        their_loss, their_norm, their_metrics, gradients, weights = torch.load(f"{folder}/{world}-{rank}-{name}-{tuple(layout)}.pt")
        assert their_loss == pytest.approx(loss, rel=1e-5) and their_norm == pytest.approx(norm, rel=1e-5)
        for key, value in metrics.items():
            torch.testing.assert_close(torch.tensor(their_metrics[key]), torch.tensor(value), rtol=1e-5, atol=1e-6, msg=key)
        for key, p in model.named_parameters():
            torch.testing.assert_close(gradients[key], p.grad, rtol=1e-5, atol=1e-6, msg=key)
            torch.testing.assert_close(weights[key], p, rtol=1e-4, atol=2e-5, msg=key)
