"""Scaling: one process against two on this machine, measured; and 1 to 64 nodes from the plan's bytes, computed.

Measured: training steps of `tiny` on the same global batch, one thread a process (and one process with two threads).
Computed: v2_30b with a fixed batch for each GPU, computation at a stated MFU, the bytes of plan.py at the links' full
speed, once wholly beside the computation and once wholly after it; the truth lies between.

    python -m benchmarks.parallel      # about 2 minutes on two cores
"""

import json
import tempfile
import time

import torch
import torch.distributed as dist

import cli
from benchmarks import keep, quartiles, shown
from compass import CONFIGS, Compass
from parallel import Layout, Ranks, parallelize
from plan import LINK, NETWORK, PEAK_FLOPS, bytes_received, model_flops
from report import table
from train import _train_step, language_model_loss, make_optimizer

ROWS, T, STEPS, WARM_UP = 16, 256, 12, 3
MFU, PLANNED_ROWS, NODES = 0.35, 6, (1, 2, 4, 8, 16, 32, 64)


def timed_steps(model):
    """Seconds of each training step on this rank's rows of a random batch."""
    torch.manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (ROWS, T))
    batch = dict(tokens=tokens, targets=tokens.roll(-1, 1), weights=torch.ones(ROWS, T), doc_ids=torch.zeros_like(tokens),
                 positions=torch.arange(T).expand(ROWS, T))  # fmt: skip
    optimizer, seconds = make_optimizer(model), []
    for _ in range(WARM_UP + STEPS):
        began = time.perf_counter()
        _train_step(model, optimizer, [model.ranks.take(batch)], language_model_loss, 1e-3, torch.device("cpu"))
        seconds.append(time.perf_counter() - began)
    return seconds[WARM_UP:]


def of_rank(rank, folder, layout, threads):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = Compass(CONFIGS["tiny"])
    if layout is not None:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
        model = parallelize(model, Ranks(layout, "cpu"))
    seconds = timed_steps(model)
    if rank == 0:
        json.dump(seconds, open(f"{folder}/seconds", "w"))


def measured():
    """{arm: quartiles of tokens/s}."""
    arms = {
        "1 process, 1 thread": (None, 1, 1), "1 process, 2 threads": (None, 2, 1),
        "2 processes, dp=2": (Layout(dp=2), 1, 2), "2 processes, ep=2": (Layout(ep=2), 1, 2),
    }  # fmt: skip
    speeds = {}
    for name, (layout, threads, processes) in arms.items():
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(of_rank, (folder, layout, threads), nprocs=processes)
            speeds[name] = quartiles([ROWS * T / seconds for seconds in json.load(open(f"{folder}/seconds"))])
        print(f"{name:22} {shown(speeds[name])} tokens/s")
    return speeds


def computed(name="v2_30b"):
    """Rows of weak scaling: tokens/s a GPU with all traffic beside the computation, and with all of it after the computation."""
    config, rows = CONFIGS[name], []
    context = config.max_seq_len
    seconds = PLANNED_ROWS * context * model_flops(config, context) / (PEAK_FLOPS * MFU)
    for nodes in NODES:
        received = bytes_received(config, Layout(dp=nodes, ep=8), PLANNED_ROWS * context)
        node, network = (
            sum(size for row, size in received.items() if row.endswith(link)) / speed
            for link, speed in (("node", LINK), ("network", NETWORK))
        )
        best, worst = (PLANNED_ROWS * context / t for t in (max(seconds, node, network), seconds + node + network))
        rows.append({"nodes": nodes, "node_s": node, "network_s": network, "compute_s": seconds, "overlapped": best, "exposed": worst})
        kept = worst / rows[0]["exposed"]
        print(f"{nodes:3} nodes: {best:8,.0f} tokens/s a GPU overlapped, {worst:8,.0f} exposed ({kept:.0%} of one node)")
    return rows


def tables(results):
    alone = results["tiny"]["1 process, 1 thread"][1]
    measured = [[name, shown(speed), f"{speed[1] / alone:.2f}"] for name, speed in results["tiny"].items()]
    first = results["v2_30b"][0]["exposed"]
    planned = [
        [row["nodes"], f"{row['overlapped']:,.0f}", f"{row['exposed']:,.0f}", f"{100 * row['exposed'] / first:.0f}"]
        for row in results["v2_30b"]
    ]
    return {
        "measured": table(measured, [f"`tiny`, rows of {results['context']}, {results['rows']} a step", "tokens/s", "against one thread"]),
        "planned": table(planned, ["nodes", "tokens/s a GPU, traffic beside the computation", "after it", "of one node, %"]),
    }


def main():
    cli.parse(__doc__)
    result = {"tiny": measured(), "rows": ROWS, "context": T, "v2_30b": computed(), "mfu": MFU, "rows_a_gpu": PLANNED_ROWS}
    keep("parallel", result)


if __name__ == "__main__":
    cli.run(main)
