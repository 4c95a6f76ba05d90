"""parallel.py: every layout on gloo processes gives the loss, the gradients and the clipped norm of one process."""

import copy
import dataclasses
import os

import pytest
import torch
import torch.distributed as dist

from compass import Compass
from parallel import Layout, Ranks, packed_orders, parallelize, whole_of
from train import CLIP, _train_step, language_model_loss, make_optimizer

CPU = torch.device("cpu")


def batch_of(config, rows=4, T=32, seed=0):
    """Random documents of uneven length with padding and targets that do not count."""
    g = torch.Generator().manual_seed(seed)
    tokens, targets = (torch.randint(0, config.vocab_size, (rows, T), generator=g) for _ in range(2))
    tokens[: rows // 2] //= 50  # few different tokens: some experts get far more than others
    doc_ids = torch.rand(rows, T, generator=g).lt(0.15).long().cumsum(1)
    doc_ids[-1, -7:] = -1
    starts = torch.cat((torch.ones(rows, 1, dtype=torch.bool), doc_ids[:, 1:] != doc_ids[:, :-1]), 1)
    at = torch.arange(T).expand(rows, T)
    positions = at - torch.where(starts, at, 0).cummax(1).values
    weights = torch.rand(rows, T, generator=g).lt(0.6).float() * (doc_ids >= 0)
    return dict(tokens=tokens, targets=targets, weights=weights, doc_ids=doc_ids, positions=positions)


def one_step(model, batches, ranks=None):
    loss, norm, _, metrics = _train_step(model, make_optimizer(model), batches, language_model_loss, 1e-3, CPU)
    return loss, norm, metrics


def rank_main(rank, world, folder, config, layouts):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
    batches = [batch_of(config, seed=s) for s in (0, 1)]
    for layout, recompute in layouts:
        torch.manual_seed(0)
        model = parallelize(Compass(config), Ranks(layout, "cpu"), recompute=recompute)
        loss, norm, metrics = one_step(model, [model.ranks.take(b) for b in batches])
        orders = packed_orders(model)
        gradients = {name: whole_of(p.grad, orders.get(name)) for name, p in model.named_parameters()}
        weights = {name: whole_of(p, orders.get(name)) for name, p in model.named_parameters()}
        torch.save((loss, norm, metrics, gradients, weights), f"{folder}/{world}-{rank}-{layout}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    import sys, tempfile
    sys.path.insert(0, ".")
    from compass import CONFIGS
    config = dataclasses.replace(CONFIGS["tiny"], n_layers=2, dim=32, n_heads=4, n_kv_heads=2, head_dim=8, n_experts=4, top_k=2, expert_dim=16, vocab_size=512, max_seq_len=64, mtp_depth=1)
    world = int(sys.argv[1])
    layouts = [(eval("Layout(%s)" % a), False) for a in sys.argv[2:]]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(rank_main, (world, folder, config, layouts), nprocs=world)
        torch.manual_seed(0)
        model = Compass(config)
        loss, norm, metrics = one_step(model, [batch_of(config, seed=s) for s in (0, 1)])
        for layout, _ in layouts:
            for rank in range(world):
                l, n, m, g, w = torch.load(f"{folder}/{world}-{rank}-{layout}.pt")
                print(layout, rank, loss - l, norm - n, {k: (torch.tensor(m[k]) - torch.tensor(metrics[k])).abs().max().item() for k in m})
                bad = {k: (p.grad - g[k]).abs().max().item() for k, p in model.named_parameters()}
                print(max(bad.values()), [k for k in bad if bad[k] > 1e-5])
                print(max((p - w[k]).abs().max().item() for k, p in model.named_parameters()))
