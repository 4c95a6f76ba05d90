"""The plan of a full-size run, made on a machine without a GPU: memory, traffic, FLOPs and time of one rank.

The full model is built and sharded by parallel.py over tensors without content (FakeTensor) and a process group without
partners, and runs real training code. What torch's tracker counts stands beside a formula a reader can check by hand; a gap
over 5 % is an error. Attention counts as the causal flash kernel it is on a GPU, which keeps no scores.

Shapes: N tokens of one rank in one micro-step, R = N*K rows for the experts, D, F, V, E, K, L as in compass.py.

    python parallel.py --config v2_30b --gpus 64                  # general stage, 4k
    python parallel.py --config v3_245b --gpus 512 --stage long   # 128k
"""

import collections
import contextlib
import itertools
import math
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import compass
import kernels
import parallel
from cli import InputError
from compass import LOSS_ROWS, Compass, config_named
from parallel import Ranks, layout_of, parallelize
from train import CLIP, RECIPES, make_optimizer

GPU_MEMORY, LEFT_FREE, NODE = 80e9, 0.1, 8  # bytes; share for CUDA, NCCL and fragmentation; GPUs a node
PEAK_FLOPS, LINK, NETWORK = 989e12, 450e9, 50e9  # H100: bf16 FLOP/s, NVLink and network bytes/s of one GPU, one direction
LARGEST_GAP = 0.05  # between tracker and formula
# (config, context) -> layout; what is not named takes ep=8, or what divides the GPUs. The rows of a micro-step are the recipe's
LAYOUTS = {("v2_30b", 32_768): "ep=8,cp=4", ("v3_245b", 32_768): "ep=8,cp=2", ("v3_245b", 131_072): "ep=8,cp=8"}


def traffic(collective, size, P, g):
    """Bytes a GPU receives (inside its node, over the network) for a collective on `size` bytes of the whole tensor by P ranks, g of them
    in its node. A node's GPUs share what must come from outside, each through its own network card."""
    if collective == "all_to_all":
        return size * (g - 1) / P, size * (P - g) / P
    times = 2 if collective == "all_reduce" else 1  # reduce, then gather
    outside = times * size * (P - g) / P / g
    return times * size * (P - 1) / P - outside, outside


class Accountant(TorchDispatchMode):
    """Counts what passes: FLOPs, and bytes received by (collective, link)."""

    def __init__(self):
        super().__init__()
        self.flops, self.bytes = 0, collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in name:
            self._note(name, args, out)
        elif (kind := torch.ops.aten.addmm if name == "addmm_" else func.overloadpacket) in flop_registry:
            self.flops += flop_registry[kind](*args, **(kwargs or {}), out_val=out)
        elif name == "_grouped_mm":
            self.flops += 2 * args[0].shape[0] * args[0].shape[1] * args[1].shape[-1]
        elif name.startswith("_scaled_dot_product_flash_attention_for_cpu"):
            backward = "backward" in name
            q, k = args[backward : backward + 2]
            products = 5 if backward else 2  # the backward pass makes the scores again
            self.flops += products * q.numel() * k.shape[2]  # 2 FLOPs, of which the causal mask leaves half
        return out

    def _note(self, name, args, out):
        kinds = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")  # c10d writes some of them without the underscores
        kind = next(kind for kind in kinds if name.replace("_", "").startswith(kind.replace("_", "")))
        handles = [a for a in args if isinstance(a, torch.ScriptObject)]
        group = dist.ProcessGroup.unbox(handles[0]) if handles else dist.distributed_c10d._resolve_process_group(args[-1])
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, out)) if isinstance(t, torch.Tensor)]
        size = max(t.numel() * t.element_size() for t in tensors)
        ranks = dist.get_process_group_ranks(group)
        inside = sum(rank // NODE == ranks[0] // NODE for rank in ranks)
        for link, received in zip(("node", "network"), traffic(kind, size, len(ranks), inside), strict=True):
            self.bytes[kind, link] += received


class FusedNorm(torch.autograd.Function):
    """What RMSNorm allocates and keeps on a GPU, where it is one kernel; a CPU would keep fp32 copies."""

    @staticmethod
    def forward(ctx, x_BTD, weight):
        ctx.save_for_backward(x_BTD, weight, x_BTD.new_empty(x_BTD.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x_BTD)

    @staticmethod
    def backward(ctx, grad_BTD):
        x_BTD, weight, _ = ctx.saved_tensors
        return torch.empty_like(x_BTD), torch.empty_like(weight)


def substitutes(imbalance):
    """(owner, name, stand-in): what needs the values of tensors, and what a GPU does in another way than a CPU."""

    def exchange_sizes(sent_PE, got_PE, rows):  # an even spread out, `imbalance` times as much in
        P = len(sent_PE)
        return [rows // P + (i < rows % P) for i in range(P)], [int(rows // P * imbalance)] * P

    yield compass, "rows_where", lambda mask: slice(None)
    yield Ranks, "mask", lambda ranks, doc_ids_BT: None  # plain causal: shapes and kept memory are those of the masked kernel
    yield parallel, "exchange_sizes", exchange_sizes
    yield torch.nn.RMSNorm, "forward", lambda norm, x_BTD: FusedNorm.apply(x_BTD, norm.weight)
    if kernels.triton:
        yield kernels, "use_triton", lambda x: True
        for name in ("scatter_kernel", "gather_kernel", "gather_backward_kernel"):
            # kernel[grid](...) does nothing: what a GPU would allocate has been allocated when it is launched
            yield kernels, name, collections.defaultdict(lambda: lambda *args, **kwargs: None)


def tracked(config, layout, rows, T, imbalance=1.0):
    """What one rank of the real code uses, as {row of the plan: bytes or FLOPs}: a step, then the micro-step that is counted."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=math.prod(layout[:5]))
    with torch.device("meta"):
        model = Compass(config)
    parallelize(model, Ranks(layout, "cpu"), recompute=True, dtype=torch.bfloat16)
    model.forward, model.hidden = Compass.loss.__get__(model), Compass.hidden.__get__(model)  # the tracker follows forward alone
    with FakeTensorMode(allow_non_fake_inputs=True), contextlib.ExitStack() as stack:
        for owner, name, substitute in substitutes(imbalance):
            stack.enter_context(mock.patch.object(owner, name, substitute))
        model.to_empty(device="cpu")
        optimizer = make_optimizer(model)
        tokens_BT, weights_BT = torch.zeros(rows, T, dtype=torch.int64), torch.ones(rows, T)
        model(tokens_BT, tokens_BT, weights_BT).total.backward()
        model.ranks.clip(model.parameters(), CLIP)
        optimizer.step()
        # the gradients stay: from the second micro-step of a step on they lie beside the activations
        with Accountant() as accountant, FSDPMemTracker(model, optimizer) as tracker:
            total = model(tokens_BT, tokens_BT, weights_BT).total
            kept = tracker.get_tracker_snapshot("current")[torch.device("cpu")]
            total.backward()
            peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    dist.destroy_process_group()
    kept = {getattr(kind, "value", kind): size for kind, size in kept.items()}
    return {
        "parameters": kept["Sharded Param"], "gradients": kept["Sharded Grad"], "optimizer": kept["OptState"],
        "activations": kept["Activation"], "peak": peak, "FLOPs": accountant.flops, **named(accountant.bytes),
    }  # fmt: skip


def named(counter):
    """{(collective, link): bytes} under the names of the plan's rows; the all-reduces of single numbers are left out without tp."""
    return {f"{kind}, {link}": size for (kind, link), size in counter.items() if size > 1e-3 * max(counter.values())}


class Sizes:
    """Numbers of parameters of one rank's modules, after tensor parallelism and expert parallelism but before FSDP."""

    def __init__(self, c, layout):
        S = c.n_shared * c.expert_dim
        self.attention = c.dim * (2 * c.n_heads + 2 * c.n_kv_heads) * c.head_dim // layout.tp
        self.shared = 3 * c.dim * S // layout.tp
        self.router = c.dim * c.n_experts
        self.experts = c.n_experts * 3 * c.dim * c.expert_dim // layout.ep
        self.block = self.attention + 2 * c.dim + self.shared  # gathered in bf16 over all data ranks
        self.mtp_block = self.attention + 2 * c.dim + 3 * c.dim * (c.top_k + c.n_shared) * c.expert_dim // layout.tp
        self.embedding = c.vocab_size * c.dim
        self.root = self.embedding + c.dim + c.mtp_depth * (2 * c.dim * c.dim + 2 * c.dim)  # head, norms, what joins MTP's inputs
        self.dense = c.n_layers * (self.block + self.router) + self.embedding + self.root + c.mtp_depth * self.mtp_block


def formula(c, layout, rows, T, imbalance=1.0):
    """The rows of `tracked` by hand. bf16 is 2 bytes, fp32 4; sizes in bytes per token are multiplied by N at the end."""
    n, N = Sizes(c, layout), rows * T // layout.cp
    data, experts = layout.dp * layout.cp * layout.ep, layout.dp * layout.cp
    parameters = 4 * (n.dense / data + c.n_layers * n.experts / experts)
    K, D, H, G, C, F, S = c.top_k, c.dim, c.n_heads, c.n_kv_heads, c.head_dim, c.expert_dim, c.n_shared * c.expert_dim // layout.tp
    H, G = H // layout.tp, G // layout.tp
    # kept from forward to backward: the input of every block, the final hidden state and its gradient, the router's outputs; the
    # head's gradient, which the loss makes in its forward pass
    routing = c.n_layers * (8 * c.n_experts + 8 * K) + 4 * C
    kept = 2 * D * (c.n_layers + 2 + 6 * c.mtp_depth) + routing
    head = 2 * n.embedding * (1 + c.mtp_depth)
    # in the backward pass of a block all it made lies there again: queries, keys, values, output (on one cp rank v is a view of qkv);
    # two norms, the sum between them, the incoming gradient and the router's fp32 input; rows in and out of the experts, gate, up,
    # silu, product; the same for the shared experts
    values = 2 * (H + 2 * G) * C if layout.cp == 1 else layout.cp * 4 * G * C
    attention = values + 2 * (H + G) * C + 2 * H * C + 4 * H
    K_in = K * imbalance
    block = attention + 12 * D + 2 * K * D + 2 * K_in * D + 8 * K_in * F + 8 * S
    in_recompute = 2 * D + 2 * K_in * D  # rows not yet handed back, and the experts' sum
    in_shared_backward = 4 * S
    gathered = 2 * n.root + 2 * (n.block + n.experts) + 2 * n.embedding * (c.mtp_depth > 0)
    unsharded = 2 * n.root + (c.mtp_depth > 0) * (2 * n.embedding + 4 * n.mtp_block)  # gradients; MTP's are on their way to the ranks
    block_moment = gathered + unsharded + N * (
        2 * D * c.n_layers + routing + block + max(in_recompute, in_shared_backward)
    ) + (2 * D * S if in_shared_backward > in_recompute else 0)  # fmt: skip
    # at the very end head and embedding have their gradients, and the head's are copied to fp32 for the sum over ranks
    end_moment = 2 * n.root + 2 * n.root + 2 * n.embedding + 4 * n.root * (1 + 1 / data)
    # in the loss what is kept lies beside a chunk's logits, in bf16 and in fp32; of a small model that is the most
    loss_moment = 2 * n.root + 2 * n.embedding * (c.mtp_depth > 0) + N * kept + head + (2 + 4) * LOSS_ROWS * c.vocab_size
    peak = 4 * parameters + max(block_moment, loss_moment, end_moment)
    return {
        "parameters": parameters, "gradients": parameters, "optimizer": 2 * parameters,
        "activations": N * kept + head, "peak": peak, "FLOPs": flops(c, layout, N, T, imbalance), **bytes_received(c, layout, N, imbalance),
    }  # fmt: skip


def flops(c, layout, N, T, imbalance=1.0):
    """Of one rank and micro-step. Blocks run 4 times (forward, recomputed, two products in backward), but the last product of a
    recomputed block is never needed; the head's three products all lie in the loss."""
    n, D = Sizes(c, layout), c.dim
    width = c.n_shared * c.expert_dim // layout.tp
    dense_width = (c.top_k + c.n_shared) * c.expert_dim // layout.tp
    routed = c.top_k * 3 * D * c.expert_dim
    attention = 9 * c.n_heads // layout.tp * c.head_dim * T  # 2 products, again, and 5 in backward; half of each is masked
    block = 8 * (n.attention + n.shared + n.router + imbalance * routed) - 2 * width * D + attention
    mtp = 8 * (n.mtp_block - 2 * D) - 2 * dense_width * D + attention + 6 * 2 * D * D
    return N * (c.n_layers * block + c.mtp_depth * mtp + (1 + c.mtp_depth) * 6 * n.embedding)


def bytes_received(c, layout, N, imbalance=1.0):
    """{"collective, link": bytes} of one rank and micro-step. Weights are gathered for forward and for backward (the root once), in
    bf16 (the router in fp32), gradients are summed in fp32; rows go to their experts and back in forward, recomputation and backward
    (the fullest rank gets more than it sends, then sends more than it gets: the larger is counted)."""
    n, L, M = Sizes(c, layout), c.n_layers, c.mtp_depth

    def group(size, stride):
        """(ranks, those of them in one node) of an axis whose neighbours are `stride` ranks apart."""
        return size, min(size, math.ceil(NODE / stride))

    data, experts = group(layout.dp * layout.cp * layout.ep, layout.tp), group(layout.dp * layout.cp, layout.tp * layout.ep)
    routed, context = group(layout.ep, layout.tp), group(layout.cp, layout.tp * layout.ep)
    counter = collections.Counter()
    for kind, size, ranks in (
        ("all_gather", 2 * L * (2 * n.block + 4 * n.router) + 2 * n.root + 2 * n.embedding * (2 + M) + 4 * M * n.mtp_block, data),
        ("reduce_scatter", 4 * n.dense, data),
        ("all_gather", 2 * 2 * L * n.experts, experts),
        ("reduce_scatter", 4 * L * n.experts, experts),
        ("all_to_all", 6 * L * 2 * N * c.top_k * c.dim * imbalance, routed),
        ("all_gather", 2 * (L + M) * N * layout.cp * 4 * c.n_kv_heads // layout.tp * c.head_dim, context),
        ("reduce_scatter", (L + M) * N * layout.cp * 4 * c.n_kv_heads // layout.tp * c.head_dim, context),
        ("all_reduce", 5 * (L + M) * N * 2 * c.dim, group(layout.tp, 1)),
    ):  # fmt: skip
        for link, size_of_link in zip(("node", "network"), traffic(kind, size, *ranks), strict=True):
            counter[kind, link] += size_of_link
    return named(counter)


def model_flops(c, T):
    """Forward and backward FLOPs of a token, nothing computed twice: what MFU counts."""
    n = Sizes(c, parallel.Layout())
    active = c.n_layers * (n.attention + n.shared + n.router + c.top_k * 3 * c.dim * c.expert_dim) + n.embedding
    mtp = c.mtp_depth * (n.mtp_block + 2 * c.dim * c.dim + n.embedding)
    return 6 * (active + mtp) + 6 * (c.n_layers + c.mtp_depth) * c.n_heads * c.head_dim * T


def checked(config, layout, rows, T, imbalance):
    """Print tracker and formula side by side; InputError where they are too far apart. Returns the formula's rows."""
    counted, by_hand = tracked(config, layout, rows, T, imbalance), formula(config, layout, rows, T, imbalance)
    print(f"\n{'one GPU, one micro-step':26} {'tracker':>10} {'formula':>10}     gap")
    worst = 0.0
    for row in dict.fromkeys([*counted, *by_hand]):
        a, b = counted.get(row, 0), by_hand.get(row, 0)
        gap = abs(a - b) / max(a, b)
        worst = max(worst, gap)
        unit, scale = ("TFLOP", 1e12) if row == "FLOPs" else ("GB", 1e9)
        print(f"{row:26} {a / scale:10.2f} {b / scale:10.2f} {unit:5} {100 * gap:5.2f} %")
    if worst > LARGEST_GAP:
        raise InputError(f"tracker and formula are {100 * worst:.1f} % apart, more than {100 * LARGEST_GAP:.0f} %: one of them is wrong")
    return by_hand


def step_time(config, layout, recipe, rows, mfu, imbalance=1.0):
    """(micro-steps, seconds of computation, of NVLink, of the network) of an optimizer step; both links at full speed, those of the
    fullest rank."""
    world, T = math.prod(layout[:5]), recipe.seq_len
    micro_steps = math.ceil(recipe.rows / (layout.dp * layout.ep * rows))
    received = bytes_received(config, layout, rows * T // layout.cp, imbalance)
    seconds = recipe.rows * T * model_flops(config, T) / (world * PEAK_FLOPS * mfu)
    links = [sum(size for row, size in received.items() if row.endswith(link)) for link in ("node", "network")]
    return micro_steps, seconds, micro_steps * links[0] / LINK, micro_steps * links[1] / NETWORK


def refuse_uneven(total, layout, rows):
    """Raise InputError where a step of `total` rows leaves some ranks of a micro-step, or pipeline stages, without work."""
    ways = layout.dp * layout.ep
    if 0 < total % (ways * rows) < ways:
        raise InputError(f"the last micro-step has {total % (ways * rows)} rows for dp x ep = {ways}: take another layout or --rows")
    if total < ways * layout.pp:
        raise InputError(f"{total} rows a step leave dp x ep = {ways} ranks fewer micro-batches than {layout.pp} pipeline stages")


def advice(config, recipe, gpus, rows, imbalance=1.0):
    """The first layout near by whose formula fits and whose ranks all have rows, as text."""
    ep, T = math.gcd(NODE, gpus), recipe.seq_len
    for cp, few in itertools.product((1, 2, 4, 8, 16), sorted({rows, 1}, reverse=True)):
        with contextlib.suppress(InputError):  # a layout that cannot be
            layout = layout_of(f"ep={ep},cp={cp}", gpus, config)
            refuse_uneven(recipe.rows, layout, few)
            if T % (2 * cp) == 0 and formula(config, layout, few, T, imbalance)["peak"] <= (1 - LEFT_FREE) * GPU_MEMORY:
                return f"--parallel ep={ep},cp={cp} with --rows {few} fits by formula"
    return f"no layout with ep={ep} and cp up to 16 fits by formula: take more GPUs"


def pipeline_table(config, layout, recipe, rows):
    """Bubble and memory of pipeline stages, by formula: 1F1B, and interleaved (VPP) with 2 or more chunks of layers a stage."""
    pp, micro_steps = layout.pp, math.ceil(recipe.rows / (layout.dp * layout.ep * rows))
    whole = formula(config, layout._replace(pp=1), rows, recipe.seq_len)
    kept = rows * recipe.seq_len // layout.cp * 2 * config.dim * config.n_layers / pp  # block inputs of one micro-batch
    state = (whole["parameters"] + whole["gradients"] + whole["optimizer"]) / pp
    # torch's stages gather weights (bf16) and sum gradients (fp32) once a step, not once a micro-step
    sizes = Sizes(config, layout)
    held = (2 + 4) * (config.n_layers / pp * (sizes.block + sizes.router + sizes.experts) + sizes.root / pp)
    print(f"\npipeline of {pp} stages, {micro_steps} micro-steps, by formula   bubble   kept activations of the stages, GB")
    for chunks in (1, max(2, layout.vpp)):
        if pp * chunks > config.n_layers:
            continue
        name, bubble = "1F1B" if chunks == 1 else f"interleaved, {chunks} chunks", (pp - 1) / (chunks * micro_steps + pp - 1)
        if chunks == 1:
            flying = [pp - stage for stage in range(pp)]
        else:  # warm-up of Narayanan et al. 2021: 2 (pp - stage - 1) + (chunks - 1) pp chunks, and the one at work
            flying = [(2 * (pp - stage - 1) + (chunks - 1) * pp + 1) / chunks for stage in range(pp)]
        print(f"  {name:30} {100 * bubble:20.2f} %   {' '.join(f'{kept * min(n, micro_steps) / 1e9:.1f}' for n in flying)}")
    total = state + held + pp * kept
    print(f"  besides, a stage holds {state / 1e9:.1f} GB of shards and, until a step ends, {held / 1e9:.1f} GB of gathered weights and "
          f"gradients:\n  1F1B needs at least {total / 1e9:.1f} of {GPU_MEMORY / 1e9:.0f} GB and "
          + ("fits" if total <= (1 - LEFT_FREE) * GPU_MEMORY else "does not fit: take smaller stages, or leave pp at 1"))  # fmt: skip


def report(args):
    """Print the whole plan for the flags of parallel.py."""
    config, stage = config_named(args.config), args.stage
    if not 0 < args.mfu <= 1:
        raise InputError(f"--mfu is {args.mfu}, must be over 0 and at most 1")
    if not 1 <= args.imbalance < math.inf:
        raise InputError(f"--imbalance is {args.imbalance}: the fullest rank has at least an even share, 1")
    recipe = RECIPES[args.config].get(stage)
    if recipe is None:
        raise InputError(f"--stage {stage} is not one of {', '.join(RECIPES[args.config])} of {args.config}")
    T = recipe.seq_len
    rows = args.rows or recipe.micro_rows
    layout = layout_of(args.parallel or LAYOUTS.get((args.config, T), f"ep={math.gcd(NODE, args.gpus)}"), args.gpus, config)
    if args.imbalance > 1 and (layout.ep == 1 or layout.pp > 1):
        raise InputError("--imbalance is of expert ranks and counted without pipeline stages: it needs ep over 1 and pp = 1")
    print(f"{args.config}, stage {stage}: {recipe.schedule.steps:,} steps of {recipe.rows} rows of {T:,} tokens on {args.gpus} GPUs")
    print(f"layout {layout}: {rows} rows of {T // layout.cp:,} tokens a GPU and micro-step"
          f"\nfp32 shards of weights, gradients and moments, bf16 computation, blocks recomputed; expert ranks get "
          f"{args.imbalance:g} times an even share")  # fmt: skip
    if config.mtp_depth:
        print("multi-token prediction is counted in every step; where the stage leaves it out, all is a little less")
    refuse_uneven(recipe.rows, layout, rows)
    if layout.pp > 1:
        pipeline_table(config, layout, recipe, rows)
        return
    peak = checked(config, layout, rows, T, args.imbalance)["peak"]
    fits = peak <= (1 - LEFT_FREE) * GPU_MEMORY
    print(f"\npeak {peak / 1e9:.1f} of {GPU_MEMORY / 1e9:.0f} GB, {LEFT_FREE:.0%} of which stay free for CUDA, NCCL and fragmentation: "
          + ("fits" if fits else "does not fit; " + advice(config, recipe, args.gpus, rows, args.imbalance)))  # fmt: skip
    micro_steps, compute, node, network = step_time(config, layout, recipe, rows, args.mfu, args.imbalance)
    print(f"a step: {micro_steps} micro-steps, {compute:.1f} s of computation at {args.mfu:.0%} MFU; at full speed NVLink "
          f"({LINK / 1e9:.0f} GB/s) is busy for {node:.1f} s\nand the network ({NETWORK / 1e9:.0f} GB/s) for {network:.1f} s, "
          f"beside it where they overlap")  # fmt: skip
    speed = recipe.rows * T / max(compute, node, network)
    print(f"model FLOPs a token {model_flops(config, T) / 1e9:.1f} G; {speed:,.0f} tokens/s, {speed / args.gpus:,.0f} a GPU")
    days = {name: r.schedule.steps * r.rows * r.seq_len * model_flops(config, r.seq_len) / (args.gpus * PEAK_FLOPS * args.mfu) / 86400
            for name, r in RECIPES[args.config].items()}  # fmt: skip
    tokens = {name: r.schedule.steps * r.rows * r.seq_len / 1e12 for name, r in RECIPES[args.config].items()}
    print("days at that MFU: " + ", ".join(f"{name} {days[name]:.1f} ({tokens[name]:.2f}T tokens)" for name in days))
