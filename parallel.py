"""Many processes, one model: data, expert, context and tensor parallelism with torch's own engine (v2 §2.3; v3's experts in a node).

The ranks form one mesh (pp, dp, cp, ep, tp). dp and ep read different rows, cp different parts of a row, tp the same tokens
with a part of the heads and of the shared experts' width. Experts live on ep, and are sharded (FSDP2) over dp x cp;
everything else is sharded over dp x cp x ep. Every loss, gradient and norm equals that of a single process on the whole batch.

Shapes: B rows, T tokens, D model width, E experts, R rows sorted by expert, S rows that arrive at this rank's experts, P ranks.

    python tokenizer.py --run runs/two && torchrun --nproc-per-node 2 -- train.py --parallel ep=2 --run runs/two    # a laptop
    python parallel.py --config v2_30b --gpus 64               # the plan of a full-size run, on this machine, without a GPU
"""

import atexit
import functools
import math
import os
import sys
import time
import warnings
import zlib
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._functional_collectives import all_gather_single_autograd, all_to_all_single, wait_tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from torch.utils.checkpoint import checkpoint

import cli
from cli import InputError
from compass import Compass, attend, document_mask, first_head, init_parameter
from kernels import move_rows, sort_by_expert
from moe import MoE, grouped_swiglu
from pipeline import Pipeline


class Layout(NamedTuple):
    """How many ranks along each axis; their product is the number of processes. vpp: runs of layers on each pipeline rank."""

    pp: int = 1
    dp: int = 1
    cp: int = 1
    ep: int = 1
    tp: int = 1
    vpp: int = 1

    def __str__(self):
        return ", ".join(f"{axis}={size}" for axis, size in self._asdict().items())


def layout_of(text, world, config):
    """Parse `--parallel` ("ep=2,cp=2"); dp takes what is left of the world. Raises InputError for a size that does not fit."""
    sizes = {}
    for part in filter(None, (text or "").split(",")):
        axis, _, size = part.partition("=")
        if axis not in Layout._fields or axis in sizes or not size.isdecimal() or int(size) < 1:
            raise InputError(f"--parallel {text}: {part!r} is not one of pp, dp, cp, ep, tp, vpp, named once, with a number: ep=2,cp=2")
        sizes[axis] = int(size)
    ranks = {axis: size for axis, size in sizes.items() if axis != "vpp"}
    rest = math.prod(size for axis, size in ranks.items() if axis != "dp")
    if world % rest or sizes.get("dp", world // rest) * rest != world:
        raise InputError(f"--parallel {text}: {' x '.join(f'{a}={n}' for a, n in ranks.items())} does not make {world} processes")
    layout = Layout(**{**sizes, "dp": world // rest})
    if layout.vpp > 1 and layout.pp == 1:
        raise InputError(f"--parallel vpp={layout.vpp} cuts a pipeline's stages into runs of layers: name pp, too")
    for axis, what, number in (
        ("ep", "n_experts", config.n_experts), ("tp", "n_kv_heads", config.n_kv_heads),
        ("tp", "n_shared * expert_dim", config.n_shared * config.expert_dim),
        ("tp", "(top_k + n_shared) * expert_dim", (config.top_k + config.n_shared) * config.expert_dim * bool(config.mtp_depth)),
    ):  # fmt: skip
        if number % getattr(layout, axis):
            raise InputError(f"--parallel {axis}={getattr(layout, axis)} must divide {what}, which is {number}")
    if layout.pp * layout.vpp > config.n_layers:
        raise InputError(f"--parallel pp x vpp = {layout.pp * layout.vpp} is more than n_layers, which is {config.n_layers}")
    name, cut = ("dp x cp x ep", layout.dp * layout.cp * layout.ep) if layout.tp > 1 else ("dp x cp", layout.dp * layout.cp)
    if config.dim % cut:  # what ep and tp have cut by rows, FSDP cuts by columns, and evenly
        raise InputError(f"--parallel {name} = {cut} must divide dim, which is {config.dim}")
    return layout


class Ranks:
    """compass.OneRank for many: this process's place in the mesh, and what it has to ask of the others.

    data is the part of the mesh that reads different tokens (dp x cp x ep), experts the part that holds the same experts (dp x cp).
    """

    def __init__(self, layout, device_type):
        self.several, self.layout, self.device_type = True, layout, device_type
        self.mesh = init_device_mesh(device_type, layout[:5], mesh_dim_names=layout._fields[:5])  # all but vpp
        self.data = self.mesh["dp", "cp", "ep"]._flatten("data")
        self.experts = self.mesh["dp", "cp"]._flatten("experts")
        self.count = layout.dp * layout.ep
        self.index = self.mesh.get_local_rank("dp") * layout.ep + self.mesh.get_local_rank("ep")
        self.writes = dist.get_rank() == 0

    def sum(self, x):
        x = x.detach().clone()
        dist.all_reduce(x, group=self.data.get_group())
        return x

    def order(self, T, device):
        """Places of the T tokens on each of the cp ranks, (cp, T/cp): of 2cp chunks rank r has chunk r and the r-th last, so that
        under a causal mask all have the same to do."""
        if T % (2 * self.layout.cp):
            raise InputError(f"a row of {T} tokens cannot be cut into 2 x cp = {2 * self.layout.cp} equal parts")
        chunks = torch.arange(T, device=device).view(2 * self.layout.cp, -1)
        return torch.stack([torch.cat((chunks[r], chunks[-1 - r])) for r in range(self.layout.cp)])

    def part(self, x_BT):
        return x_BT if self.layout.cp == 1 else x_BT[:, self.order(x_BT.shape[1], x_BT.device)[self.mesh.get_local_rank("cp")]]

    def whole(self, x_BT):
        if self.layout.cp == 1:
            return x_BT
        places = self.order(x_BT.shape[1] * self.layout.cp, x_BT.device).flatten()
        return wait_tensor(all_gather_single_autograd(x_BT, 1, self.mesh["cp"].get_group()))[:, places.argsort()]

    def mask(self, doc_ids_BT):
        if self.layout.cp == 1:
            return None if doc_ids_BT is None else document_mask(doc_ids_BT)
        if doc_ids_BT is None:
            raise InputError("context parallelism needs doc_ids (zeros where a row is one document)")
        order = self.order(doc_ids_BT.shape[1], doc_ids_BT.device)
        mine_T, keys_T = order[self.mesh.get_local_rank("cp")], order.flatten()  # places in the row; the keys in the order of gathering

        def visible(b, h, q, k):
            return (mine_T[q] >= keys_T[k]) & (doc_ids_BT[b, mine_T[q]] == doc_ids_BT[b, keys_T[k]])

        make = create_block_mask if doc_ids_BT.is_cuda else create_mask  # blocks of which nothing is visible cost nothing
        return make(visible, len(doc_ids_BT), None, len(mine_T), len(keys_T), doc_ids_BT.device)

    def take(self, batch):
        """Rows of every tensor by their index among the weights: a pair's two rows stay together."""
        n = len(batch["weights"])
        if n < self.count:
            raise InputError(f"a batch of {n} rows cannot be spread over {self.count} ranks (dp x ep): take fewer processes or more cp")
        mine = slice(self.index * n // self.count, (self.index + 1) * n // self.count)
        return {name: x.unflatten(0, (-1, n))[:, mine].flatten(0, 1) for name, x in batch.items()}

    def agree(self, flag):
        flag = torch.tensor(float(flag), device=self.device_type)
        dist.all_reduce(flag)
        return flag.item() > 0

    def clip(self, parameters, limit):
        """torch's clip_grad_norm_ over parameters of different meshes: every element counts once, whoever holds it."""
        parameters = [p for p in parameters if p.grad is not None]
        on_stage = dist.get_world_size() // self.layout.pp
        squares = sum(p.grad.to_local().float().square().sum() * (p.device_mesh.size() / on_stage) for p in parameters)
        dist.all_reduce(squares)
        norm = squares.sqrt()
        for p in parameters:
            p.grad.to_local().mul_((limit / (norm + 1e-6)).clamp(max=1.0))
        return norm


def attend_in_context(group, q_BHTC, k_BGTC, v_BGTC, mask):
    """compass.attend of this rank's queries over the keys and values of all cp ranks."""
    k_BGTC, v_BGTC = wait_tensor(all_gather_single_autograd(torch.cat((k_BGTC, v_BGTC), dim=-1), 2, group)).chunk(2, dim=-1)
    return attend(q_BHTC, k_BGTC, v_BGTC, mask)


def exchange_sizes(sent_PE, got_PE, rows):
    """Rows that go to and come from each rank, two lists: the one place where the host waits for a device's numbers. plan.py, whose
    tensors hold no numbers, puts a guess made from `rows` here."""
    return torch.stack((sent_PE.sum(1), got_PE.sum(1))).tolist()


def exchange_and_compute(moe, group, x_RD, counts_E):
    """MoE.experts with the experts spread over a group: rows go to their expert's rank, are sorted by expert there, and come back."""
    P = group.size()
    sent_PE = counts_E.view(P, -1)
    got_PE = all_to_all_single(sent_PE, None, None, group)
    sent, got = exchange_sizes(sent_PE, got_PE, len(x_RD))
    x_SD = all_to_all_single(x_RD, got, sent, group)
    local = torch.arange(sent_PE.shape[1], device=x_RD.device).repeat(P)
    expert_S = local.repeat_interleave(got_PE.flatten(), output_size=sum(got))
    from_S, to_S, counts_E = sort_by_expert(expert_S, sent_PE.shape[1])
    weights = moe.gate_up_ED2F.to_local(), moe.down_EFD.to_local()
    x_SD = move_rows(x_SD, from_S, to_S)
    y_SD = move_rows(grouped_swiglu(x_SD, counts_E, *weights), to_S, from_S)
    return wait_tensor(all_to_all_single(y_SD, sent, got, group))  # Triton would read the memory of a result that is still on its way


def shard_experts(moe, mesh):
    """Leave this rank its E / ep experts."""
    for name in ("gate_up_ED2F", "down_EFD"):
        weight = distribute_tensor(getattr(moe, name), mesh, [Shard(0)], src_data_rank=None)
        setattr(moe, name, nn.Parameter(weight))
    moe.experts = functools.partial(exchange_and_compute, moe, mesh.get_group())
    moe.whole = False


def pack(linear, parts, tp):
    """Reorder the rows of a matrix made of several (q, k, v; gate, up), so that each rank's contiguous slice has its share of each."""
    segments = [rows.chunk(tp) for rows in torch.arange(len(linear.weight)).split(parts)]
    linear.packed = torch.cat([segment[r] for r in range(tp) for segment in segments])  # checkpoints undo it
    linear.weight = nn.Parameter(linear.weight[linear.packed])


def split_width(block, mesh):
    """Tensor parallelism: attention by heads, the shared experts (or a dense feed-forward) by width; one all-reduce after each."""
    tp, attention = mesh.size(), block.attention
    pack(attention.qkv, [heads * attention.C for heads in (attention.H, attention.G, attention.G)], tp)
    attention.H, attention.G = attention.H // tp, attention.G // tp
    parallelize_module(attention, mesh, {"qkv": ColwiseParallel(), "out": RowwiseParallel()})
    shared = block.feed_forward.shared if isinstance(block.feed_forward, MoE) else block.feed_forward
    if shared is not None:
        pack(shared.gate_up, len(shared.gate_up.weight) // 2, tp)
        parallelize_module(shared, mesh, {"gate_up": ColwiseParallel(), "down": RowwiseParallel()})


def fsdp_dim(p):
    """The dimension FSDP shards: rows (0), or columns (1) where tp or ep have split the rows already."""
    return Shard(1) if isinstance(p, DTensor) and p.placements[0] == Shard(0) else Shard(0)


def shard(module, mesh, placement=fsdp_dim, **precision):
    """FSDP of a module, in its own precision unless another is given; gradients add up, as the losses are weighed already."""
    fully_shard(module, mesh=mesh, shard_placement_fn=placement, mp_policy=MixedPrecisionPolicy(**precision, cast_forward_inputs=False))
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)


def parallelize(model, ranks, *, recompute=False, dtype=None):
    """Make a Compass (on any device, "meta" too) one rank's part of the whole, in place.

    recompute: activation checkpointing, block by block. dtype: of the gathered weights and so of the computation (bf16 on a GPU);
    the shards, the router and the sums over ranks stay fp32.
    """
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # about in-place changes of its output, of which we make none
    layout, mesh = ranks.layout, ranks.mesh
    half = dict(param_dtype=dtype, reduce_dtype=torch.float32)
    model.ranks = ranks
    for block in (*model.blocks.children(), *(mtp.block for mtp in model.mtp)):  # a pipeline stage's, or all
        routed = isinstance(block.feed_forward, MoE)
        if layout.cp > 1:
            block.attention.attend = functools.partial(attend_in_context, mesh["cp"].get_group())
        if layout.ep > 1 and routed:
            shard_experts(block.feed_forward, mesh["ep"])
        if layout.tp > 1:
            split_width(block, mesh["tp"])
        if recompute:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if routed:
            moe = block.feed_forward
            shard(moe.router, ranks.data)
            if moe.shared is not None:
                shard(moe.shared, ranks.data, **half)
            shard(moe, ranks.experts, lambda p, gate_up=moe.gate_up_ED2F: Shard(1 if p is gate_up else 2), **half)
        shard(block, ranks.data, **half)
    if model.embedding is not None:
        shard(model.embedding, ranks.data, **half)
    shard(model, ranks.data, **half)
    register_fsdp_forward_method(model, "hidden")  # the final norm and the head stay gathered behind it
    return model


def packed_orders(model):
    """{parameter: row order} of what tensor parallelism reordered."""
    parts = getattr(model, "stages", [model])  # of a pipeline, or the model itself
    return {f"{name}.weight": m.packed for part in parts for name, m in part.named_modules() if hasattr(m, "packed")}


def start(text, config_of, device_name):
    """Join the processes that torchrun started: (this rank's device, Ranks). The first rank speaks for all. config_of() is asked when
    they have met, for reading a checkpoint is work they share."""
    if "LOCAL_RANK" not in os.environ:
        script = os.path.basename(sys.argv[0])
        raise InputError(f"--parallel {text} needs several processes: torchrun --nproc-per-node N -- {script} --parallel {text}")
    if os.environ["RANK"] != "0":
        sys.stdout = open(os.devnull, "w")
    device = cli.pick_device(device_name)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if (processes := int(os.environ["LOCAL_WORLD_SIZE"])) > (gpus := torch.cuda.device_count()):  # all see it, the first one says it
            raise InputError(f"{processes} processes on a node, and torch sees {gpus} GPUs: each process needs one of its own")
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", device_id=device if device.type == "cuda" else None)
    # DTensor's caches keep gloo's threads to the end of the process, which aborts if one of them, to free the tensors of the last
    # collective, still waits for the GIL when the interpreter ends: they get it before
    atexit.register(time.sleep, 0.1)
    layout = layout_of(text, dist.get_world_size(), config_of())
    print(f"{dist.get_world_size()} processes: {layout}")
    return device, Ranks(layout, device.type)


def build(config, ranks, device, recompute):
    """This rank's part of a model, parallelized, with empty weights: all layers, or pipeline stages. A whole model never exists."""
    with torch.device("meta"):
        model = Pipeline(config, ranks) if ranks.layout.pp > 1 else Compass(config)
    for part in getattr(model, "stages", [model]):
        parallelize(part, ranks, recompute=recompute, dtype=torch.bfloat16 if device.type == "cuda" else None)
    return model.to_empty(device=device)


@torch.no_grad()
def initialise(model, seed):
    """Give a parallelized model its first weights. Each parameter has its own seed, so every layout starts from the same model; a
    parameter exists whole for a moment."""
    orders = packed_orders(model)
    for name, p in model.named_parameters():
        head = name == "head.weight"  # made from the embedding, which another pipeline stage may hold
        torch.manual_seed(zlib.crc32(f"{seed} {'embedding.weight' if head else name}".encode()))
        whole = init_parameter(name, torch.empty(p.shape, device=p.device), model.config)
        whole = first_head(whole) if head else whole
        p.copy_(sharded_like(whole, p, orders.get(name)))
    return model


def sharded_like(whole, p, order):
    """This rank's shard of a tensor that every rank holds whole."""
    whole = whole if order is None else whole[order.to(whole.device)]
    return distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)


def whole_of(p, order):
    """The whole tensor, in the order of a single process, from a parameter, gradient or moment of this layout."""
    whole = p.full_tensor()
    return whole if order is None else torch.empty_like(whole).index_copy_(0, order.to(whole.device), whole)


def main():
    args = cli.parse(
        __doc__, "config", "stage",
        config=dict(default="v2_30b"), stage=dict(default="general", help="stage of train.py whose batch and context are planned"),
        gpus=dict(type=int, default=64, help="GPUs, eight a node"),
        parallel=dict(help="layout, as in ep=8,cp=2 (default: the plan's own)"),
        rows=dict(type=int, default=None, help="rows of a rank's micro-step (default: the plan's own)"),
        imbalance=dict(type=float, default=1.0, help="tokens of the fullest expert rank, times an even share"),
        mfu=dict(type=float, default=0.35, help="share of the GPUs' peak FLOPs assumed to be reached"),
    )  # fmt: skip
    from plan import report

    report(args)


if __name__ == "__main__":
    cli.run(main)
