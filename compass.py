"""Compass: the model and its configs (v2 §2.2; v3 for MTP and the few-large-experts shape).

A pre-norm decoder: RMSNorm, grouped-query attention with rotary positions, mixture of experts, untied embedding and head. Packed documents
never see each other, and the loss never holds the logits of a whole batch, so that a 180k vocabulary fits.

Shapes: B rows, T tokens, D model width, H query heads, G key/value heads, C head width, V vocabulary,
N = B*T, E experts, K experts per token, L layers.

    python compass.py                  # the table of configs, counted from modules on the meta device
    python train.py --config v2_30b    # the full size; see the README for nodes
"""

import dataclasses
import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import cli
from cli import InputError
from kernels import count_assignments
from moe import Linear, MoE, SwiGLU, load_balancing_loss, router_z_loss

LOSS_ROWS = 512  # targets whose logits the loss holds at a time


@dataclasses.dataclass
class CompassConfig:
    """Sizes of one model. Raises InputError (a ValueError) naming the field when a value makes no sense."""

    n_layers: int
    dim: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_experts: int
    top_k: int
    n_shared: int
    expert_dim: int
    vocab_size: int
    max_seq_len: int  # context of the general stage, in tokens
    rope_base: float = 10_000.0
    norm_eps: float = 1e-6
    aux_weight: float = 0.01  # alpha of L_aux, before decay
    z_weight: float = 0.001  # beta of L_z, before decay
    mtp_depth: int = 0  # multi-token-prediction blocks (v3)
    mtp_weight: float = 0.1

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kind = (int,) if field.type is int else (int, float)
            zero = field.name in ("n_shared", "aux_weight", "z_weight", "mtp_depth", "mtp_weight")
            if isinstance(value, bool) or not isinstance(value, kind) or not (0 < value < float("inf") or zero and value == 0):
                what = f"a {'whole ' if kind == (int,) else ''}number {'of at least' if zero else 'above'} 0"
                raise InputError(f"config field {field.name} is {value!r}, must be {what}")
        if self.n_heads % self.n_kv_heads:
            raise InputError(f"config field n_kv_heads is {self.n_kv_heads}, must divide n_heads {self.n_heads}")
        if self.head_dim % 2:
            raise InputError(f"config field head_dim is {self.head_dim}, must be even (rotary pairs)")
        if self.top_k > self.n_experts:
            raise InputError(f"config field top_k is {self.top_k}, more than n_experts {self.n_experts}")


CONFIGS = {
    "tiny": CompassConfig(3, 128, 8, 4, 32, 16, 4, 2, 64, 4096, 256),
    "tiny_v3": CompassConfig(3, 128, 8, 4, 32, 8, 2, 1, 128, 4096, 256, mtp_depth=1),
    "small": CompassConfig(16, 1024, 16, 4, 64, 48, 4, 2, 384, 64_000, 4096),
    "v2_30b": CompassConfig(30, 3072, 24, 6, 128, 48, 4, 2, 2048, 180_000, 4096),
    # v3 publishes totals, experts and top-k; depth and widths here are one solution of those totals
    "v3_245b": CompassConfig(64, 8192, 128, 8, 128, 16, 2, 2, 7904, 180_000, 8192, mtp_depth=1),
}


def config_named(name):
    if name not in CONFIGS:
        raise InputError(f"--config {name!r} is not one of {', '.join(CONFIGS)}")
    return CONFIGS[name]


class Losses(NamedTuple):
    """total = lm + router_scale (alpha aux + beta z) + mtp_scale mtp_weight mtp, all scalars; load_LE is each expert's
    share of assignments.

    nll_BT is each target's own loss in nats, without gradient, 0 where its weight is 0.
    """

    total: torch.Tensor
    lm: torch.Tensor
    aux: torch.Tensor
    z: torch.Tensor
    mtp: torch.Tensor
    load_LE: torch.Tensor
    nll_BT: torch.Tensor


def rope_table(positions_BT, head_dim, base):
    """cos and sin, each (B, T, 1, C/2), of position * base^(-2i/C) in fp32."""
    i = torch.arange(0, head_dim, 2, device=positions_BT.device, dtype=torch.float32)
    angles = positions_BT[:, :, None, None].float() * base ** (-i / head_dim)
    return angles.cos(), angles.sin()


def apply_rope(x_BTHC, cos, sin):
    """Rotate the pairs (x_i, x_{i+C/2}) by their angles; scores then depend on distance only."""
    a, b = x_BTHC.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_BTHC.dtype)


def document_mask(doc_ids_BT):
    """Causal within each document: a BlockMask for flex_attention on a GPU, elsewhere the lengths of the documents.

    A document's tokens stand together. The lengths run over the B*T tokens in order; a run of padding counts as a document.
    """
    B, T = doc_ids_BT.shape
    if doc_ids_BT.is_cuda:
        return create_block_mask(lambda b, h, q, k: (q >= k) & (doc_ids_BT[b, q] == doc_ids_BT[b, k]), B, None, T, T, doc_ids_BT.device)
    row_and_doc_N = (torch.arange(B).unsqueeze(1) * (doc_ids_BT.max() + 2) + doc_ids_BT).flatten()
    return torch.unique_consecutive(row_and_doc_N, return_counts=True)[1].tolist()


def attend_by_document(q_BHTC, k_BGTC, v_BGTC, lengths):
    """Causal attention of each document alone: the obvious way, and on a CPU the fast one (no masked scores)."""
    B, H, T, C = q_BHTC.shape
    parts = [x.transpose(1, 2).flatten(0, 1).split(lengths) for x in (q_BHTC, k_BGTC, v_BGTC)]
    outputs = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1).unsqueeze(0) for x in qkv), is_causal=True, enable_gqa=True)
        for qkv in zip(*parts, strict=True)
    ]
    return torch.cat(outputs, dim=2).squeeze(0).unflatten(1, (B, T)).transpose(0, 1)


class OneRank:
    """What the model and the training loop ask of the other ranks, answered for a single process; parallel.Ranks answers for many.

    count: parts that a batch's rows are cut into; writes: this rank writes log and bar. sum: over the ranks that share a batch, without
    gradient. part: this rank's of a sequence (context parallelism); whole: the sequence of all parts, without gradient. take: this
    rank's rows of a batch. agree: whether a flag is set on any rank. mask: what lets a part of the sequence see all that comes before
    it in its document; None is plain causal. clip: cuts the gradients' common norm and returns it.
    """

    count, several, writes = 1, False, True

    def own(self, x):
        return x

    sum = part = whole = take = agree = own

    def mask(self, doc_ids_BT):
        return None if doc_ids_BT is None else document_mask(doc_ids_BT)

    def clip(self, parameters, limit):
        return nn.utils.clip_grad_norm_(parameters, limit)


@functools.cache
def flex():
    """flex_attention: compiled on a GPU; plain on a CPU, where only tests use it (uncompiled it holds all scores at once)."""
    torch._dynamo.config.recompile_limit = 64  # dtypes, gradients and lengths each need a graph; beyond the limit it runs uncompiled
    return torch.compile(flex_attention) if torch.cuda.is_available() else flex_attention


def attend(q_BHTC, k_BGTC, v_BGTC, mask):
    """Attention under a mask of any of our kinds: BlockMask, lengths of documents, booleans, None (causal)."""
    if isinstance(mask, BlockMask):
        # the main kernel: the one for few queries, which "AUTO" takes below 128 tokens, finds no tile for our groups of heads
        return flex()(q_BHTC, k_BGTC, v_BGTC, block_mask=mask, enable_gqa=True, kernel_options={"BACKEND": "TRITON"})
    if isinstance(mask, list):
        return attend_by_document(q_BHTC, k_BGTC, v_BGTC, mask)
    return F.scaled_dot_product_attention(q_BHTC, k_BGTC, v_BGTC, attn_mask=mask, is_causal=mask is None, enable_gqa=True)


class Attention(nn.Module):
    """Grouped-query attention: H query heads share G key/value heads."""

    attend = staticmethod(attend)  # context parallelism puts its own here

    def __init__(self, config):
        super().__init__()
        self.H, self.G, self.C = config.n_heads, config.n_kv_heads, config.head_dim
        self.qkv = Linear(config.dim, (self.H + 2 * self.G) * self.C)
        self.out = Linear(self.H * self.C, config.dim)

    def forward(self, x_BTD, rope, mask, cache=None, layer=None):
        B, T, _ = x_BTD.shape
        qk, v = self.qkv(x_BTD).view(B, T, self.H + 2 * self.G, self.C).split((self.H + self.G, self.G), dim=2)
        q_BHTC, k_BGTC = apply_rope(qk, *rope).transpose(1, 2).split((self.H, self.G), dim=1)
        v_BGTC = v.transpose(1, 2)
        y_BHTC = self.attend(q_BHTC, k_BGTC, v_BGTC, mask) if cache is None else cache.attend(layer, q_BHTC, k_BGTC, v_BGTC)
        return self.out(y_BHTC.transpose(1, 2).reshape(B, T, self.H * self.C))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)); the feed-forward is MoE, or dense in MTP blocks."""

    def __init__(self, config, dense=False):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        width = (config.top_k + config.n_shared) * config.expert_dim
        self.feed_forward = SwiGLU(config.dim, width) if dense else MoE(config)

    def forward(self, x_BTD, rope, mask, cache=None, layer=None):
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rope, mask, cache, layer)
        y_BTD = self.feed_forward(self.feed_forward_norm(x_BTD))
        y_BTD, *routing = y_BTD if isinstance(y_BTD, tuple) else (y_BTD,)
        return x_BTD + y_BTD, routing


class MTPBlock(nn.Module):
    """One depth of multi-token prediction (v3): previous hidden state and a later token's embedding in, one block."""

    def __init__(self, config):
        super().__init__()
        self.hidden_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.token_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.join = Linear(2 * config.dim, config.dim)
        self.block = Block(config, dense=True)

    def forward(self, h_BTD, embedded_BTD, rope, mask, cache=None, layer=None):
        joined = torch.cat((self.hidden_norm(h_BTD), self.token_norm(embedded_BTD)), dim=-1)
        return self.block(self.join(joined), rope, mask, cache, layer)[0]


class _ChunkedCrossEntropy(torch.autograd.Function):
    """sum_n w_n nll_n and nll_N, nll_n = -log softmax(h_n W^T)[target_n], a chunk of rows at a time; gradients are made in the forward."""

    @staticmethod
    def forward(ctx, h_ND, head_VD, target_N, weight_N, rows, training):
        nll_N = torch.empty_like(weight_N)
        needs_grad = training and (ctx.needs_input_grad[0] or ctx.needs_input_grad[1])
        device = h_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h_ND.dtype
        head = head_VD.to(dtype)  # once, not once a chunk
        dh_ND = torch.empty_like(h_ND) if needs_grad else None
        # of a head gathered in bf16 (FSDP) a bf16 sum, rounded in every chunk; fp32 would take twice the memory where it is scarcest
        dhead_VD = torch.zeros_like(head_VD) if needs_grad else None
        for start in range(0, len(h_ND), rows):
            h, target, weight = (t[start : start + rows] for t in (h_ND, target_N, weight_N))
            h = h.to(dtype)
            probs = (h @ head.T).float()  # logits; they become probabilities in place
            picked = probs.gather(1, target.unsqueeze(1)).squeeze(1)
            largest = probs.amax(1)
            sums = probs.sub_(largest.unsqueeze(1)).exp_().sum(1)
            nll_N[start : start + rows] = sums.log() - (picked - largest)  # in this order small losses survive large logits
            if needs_grad:  # d loss / d logits = w (softmax - onehot)
                probs.div_(sums.unsqueeze(1))
                probs.scatter_add_(1, target.unsqueeze(1), probs.new_full((len(h), 1), -1.0))
                grad = probs.mul_(weight.unsqueeze(1)).to(dtype)
                dh_ND[start : start + rows] = grad @ head
                if dtype == head_VD.dtype:
                    dhead_VD.addmm_(grad.T, h)
                else:
                    dhead_VD += grad.T @ h
            probs = grad = None  # freed before the next chunk's are made
        ctx.save_for_backward(dh_ND, dhead_VD)
        ctx.mark_non_differentiable(nll_N)
        return (nll_N * weight_N).sum(), nll_N

    @staticmethod
    def backward(ctx, grad, _):
        dh_ND, dhead_VD = ctx.saved_tensors
        return dh_ND * grad.to(dh_ND.dtype), dhead_VD * grad, None, None, None, None


def rows_where(mask_N):
    """Index of the rows where mask is true; where all are, the slice of everything, which copies nothing."""
    return slice(None) if bool(mask_N.all()) else mask_N.nonzero().squeeze(1)


def chunked_cross_entropy(h_ND, head_VD, target_N, weight_N, rows=LOSS_ROWS, total=None):
    """(weighted mean, nll_N) of the cross-entropy (nats) of softmax(h W^T); rows of weight 0 are never multiplied by the head.

    total: the mean's denominator, where it is not the sum of these weights: other ranks may hold more of them.
    """
    use_N = rows_where(weight_N > 0)
    used_N = weight_N[use_N].float()
    loss, used_nll_N = _ChunkedCrossEntropy.apply(h_ND[use_N], head_VD, target_N[use_N], used_N, rows, torch.is_grad_enabled())
    nll_N = torch.zeros_like(weight_N, dtype=torch.float32)
    nll_N[use_N] = used_nll_N
    return loss / (used_N.sum() if total is None else total).clamp_min(1e-9), nll_N


class Compass(nn.Module):
    """The whole model; `CONFIGS` holds its sizes."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        for name in ("dim", "expert_dim"):
            if getattr(config, name) % 8:
                raise InputError(f"config field {name} is {getattr(config, name)}, must be a multiple of 8 (grouped products of bf16 rows)")
        self.ranks = OneRank()
        self.router_scale = 1.0  # decays alpha and beta; set by train.fit from the schedule
        self.mtp_scale = 1.0  # 0 in steps without multi-token prediction; set likewise
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.head = Linear(config.dim, config.vocab_size)
        self.mtp = nn.ModuleList(MTPBlock(config) for _ in range(config.mtp_depth))
        init_weights(self, config)
        with torch.no_grad():
            self.head.weight.copy_(first_head(self.embedding.weight))

    def hidden(self, tokens_BT, *, doc_ids_BT=None, positions_BT=None, cache=None):
        """Return (h_BTD before the final norm, [(logits_NE, index_NK) per layer], rope, mask)."""
        if positions_BT is None:
            positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
        rope = rope_table(self.ranks.part(positions_BT), self.config.head_dim, self.config.rope_base)
        if cache is not None:
            if doc_ids_BT is not None:
                raise InputError("doc_ids_BT with a cache: each row of a cache is one document")
            cache.advance(positions_BT)
        mask = self.ranks.mask(doc_ids_BT)
        x_BTD, routing = self.embedding(self.ranks.part(tokens_BT)), []
        for layer, block in enumerate(self.blocks):
            x_BTD, routed = block(x_BTD, rope, mask, cache, layer)
            routing.append(routed)
        return x_BTD, routing, rope, mask

    def forward(self, tokens_BT, *, doc_ids_BT=None, positions_BT=None, cache=None):
        """tokens_BT (int64) -> logits_BTV.

        doc_ids_BT: which packed document each token belongs to, -1 for padding; tokens see only their own
        document. cache: a kvcache.KVCache. positions_BT: rotary positions, with a cache also the slots (default 0..T-1, so give them
        from a cache's second call on).
        """
        h_BTD, *_ = self.hidden(tokens_BT, doc_ids_BT=doc_ids_BT, positions_BT=positions_BT, cache=cache)
        return self.head(self.norm(h_BTD))

    def loss(self, tokens_BT, targets_BT, weights_BT=None, *, doc_ids_BT=None, positions_BT=None):
        """Losses of one batch (v2 §2.2). targets_BT[t] is the token after tokens_BT[t], already shifted.

        weights_BT (default ones) weighs each target; padding (doc_ids -1) never counts; where documents are packed, each one's last token
        should weigh 0, as in train.assemble, or the next one's first is predicted from it. lm is the
        weighted mean in nats; aux and z are means over layers. Where other ranks hold more of the batch, each loss is scaled so that
        its mean over the ranks, weighed by each rank's sum of weights, is that of the whole batch.
        """
        h_BTD, routing, rope, mask = self.hidden(tokens_BT, doc_ids_BT=doc_ids_BT, positions_BT=positions_BT)
        valid_BT = torch.ones_like(tokens_BT, dtype=torch.bool) if doc_ids_BT is None else doc_ids_BT >= 0
        weights_BT = valid_BT.float() if weights_BT is None else weights_BT.float() * valid_BT
        own = weights_BT.sum().clamp_min(1e-9)
        scale = self.ranks.sum(own) / own  # exactly 1 on a single rank
        lm, nll_N = self._cross_entropy(h_BTD, targets_BT, weights_BT, weights_BT)
        aux, z, load_LE = self._router_losses(routing, self.ranks.part(valid_BT).reshape(-1))
        mtp = self._mtp_loss(h_BTD, self._embed_later(tokens_BT), targets_BT, weights_BT, doc_ids_BT, rope, mask)
        lm, aux, z, mtp = (x * scale for x in (lm, aux, z, mtp))
        c = self.config
        total = lm + self.router_scale * (c.aux_weight * aux + c.z_weight * z) + self.mtp_scale * c.mtp_weight * mtp
        return Losses(total, lm, aux, z, mtp, load_LE, self.ranks.whole(nll_N.view(len(tokens_BT), -1)))

    def _cross_entropy(self, h_BTD, targets_BT, weights_BT, counted_BT):
        """counted_BT: the weights that make the mean's denominator, with those of the other ranks."""
        h_ND = self.norm(h_BTD).flatten(0, 1)
        targets_N, weights_N, counted_N = (self.ranks.part(x_BT).reshape(-1) for x_BT in (targets_BT, weights_BT, counted_BT))
        return chunked_cross_entropy(h_ND, self.head.weight, targets_N, weights_N, total=self.ranks.sum(counted_N.sum()))

    def _router_losses(self, routing, valid_N):
        E, valid = self.config.n_experts, rows_where(valid_N)
        routing = [(logits_NE[valid], index_NK[valid]) for logits_NE, index_NK in routing]
        own_LE = torch.stack([count_assignments(index_NK, E) for _, index_NK in routing])
        counts_LE = self.ranks.sum(own_LE)  # p and c are those of the whole batch: gradients of the ranks' p add up
        share = own_LE[0].sum() / counts_LE[0].sum().clamp_min(1)
        aux = [load_balancing_loss(z_NE.softmax(-1), index_NK, E, c_E) for (z_NE, index_NK), c_E in zip(routing, counts_LE, strict=True)]
        z = [router_z_loss(logits_NE) for logits_NE, _ in routing]
        return torch.stack(aux).mean() * share, torch.stack(z).mean() * share, counts_LE / counts_LE.sum(1, keepdim=True).clamp_min(1)

    def _embed_later(self, tokens_BT):
        """[embedding of token t+k for each depth k of multi-token prediction]; none in steps without it."""
        depths = range(1, self.config.mtp_depth + 1) if self.mtp_scale else ()
        return [self.embedding(self.ranks.part(tokens_BT.roll(-k, 1))) for k in depths]

    def _mtp_loss(self, h_BTD, later, targets_BT, weights_BT, doc_ids_BT, rope, mask):
        """Mean over depths; depth k sees token t+k (later[k-1], embedded) and predicts token t+k+1 of the same document.

        Each depth's sum is divided by the weights that lm counts, a few more than it has targets (DeepSeek-V3, eq. 24: 1/T): one
        denominator for both, so that micro-batches add up to the batch whichever way it is cut.
        """
        losses = [h_BTD.new_zeros(())]
        for k, (block, embedded_BTD) in enumerate(zip(self.mtp, later, strict=False), 1):
            h_BTD = block(h_BTD, embedded_BTD, rope, mask)
            weights = weights_BT.roll(-k, 1)
            weights[:, -k:] = 0
            if doc_ids_BT is not None:
                weights = weights * (doc_ids_BT == doc_ids_BT.roll(-k, 1))
            losses.append(self._cross_entropy(h_BTD, targets_BT.roll(-k, 1), weights, weights_BT)[0])
        return torch.stack(losses).sum() / max(1, len(self.mtp))


def init_weights(module, config):
    """`init_parameter` for all parameters of a model or a part of one."""
    for name, p in module.named_parameters():
        init_parameter(name, p, config)


@torch.no_grad()
def init_parameter(name, p, config):
    """Normal with std 1/sqrt(fan_in), matrices that write to the residual stream smaller by sqrt(2L); a fixed 0.02, the common choice,
    would not follow the width of the model. Queries start like their group's keys (correlation 0.5): a token looks for its like.

    That and `first_head` make a small model learn to copy in half the steps (RESULTS.md, "First weights").
    """
    if p.dim() < 2:
        return nn.init.ones_(p)
    fan_in = p.shape[1]  # (out, in) of nn.Linear, (E, in, out) of experts; an embedding counts its width
    std = fan_in**-0.5
    if name.endswith(("out.weight", "down.weight", "down_EFD")):
        std /= (2 * config.n_layers) ** 0.5
    nn.init.normal_(p, std=std)
    if name.endswith("qkv.weight"):
        q_HCD, k_GCD, _ = p.view(-1, config.head_dim, fan_in).split((config.n_heads, config.n_kv_heads, config.n_kv_heads))
        q_HCD.mul_(0.75**0.5).add_(k_GCD.repeat_interleave(config.n_heads // config.n_kv_heads, 0), alpha=0.5)
    return p


def first_head(embedding_VD):
    """The head's first weights: the embedding with the halves of its width exchanged. The head can so be learnt from the embedding by one
    matrix, in attention, where unrelated ones would have to be matched token by token; and no token begins by predicting itself."""
    return embedding_VD.roll(embedding_VD.shape[1] // 2, 1)


def count_parameters(config):
    """(total, active per token), counted on a module built on the meta device; MTP blocks are left out."""
    with torch.device("meta"):
        model = Compass(config)
    total = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("mtp."))
    idle = config.n_layers * (config.n_experts - config.top_k) * 3 * config.dim * config.expert_dim
    return total, total - idle


def main():
    cli.parse(__doc__)
    print(f"{'config':8} {'layers':>6} {'dim':>5} {'heads/kv x hd':>14} {'experts':>22} {'vocab':>7}      total /   active")
    for name, c in CONFIGS.items():
        total, active = count_parameters(c)
        heads = f"{c.n_heads}/{c.n_kv_heads} x {c.head_dim}"
        experts = f"{c.n_experts} top-{c.top_k} +{c.n_shared} x {c.expert_dim}"
        unit, scale = ("B", 1e9) if total > 5e8 else ("M", 1e6)
        size = f"{total / scale:9.2f}{unit} / {active / scale:7.2f}{unit}"
        print(f"{name:8} {c.n_layers:6} {c.dim:5} {heads:>14} {experts:>22} {c.vocab_size:7} {size}")
    c = CONFIGS["v2_30b"]
    attention = 2 * c.dim * (c.n_heads + c.n_kv_heads) * c.head_dim
    expert = 3 * c.dim * c.expert_dim
    rest = c.dim * c.n_experts + 2 * c.dim
    print(
        f"\nv2_30b by hand: {c.n_layers} layers x (attention {attention / 1e6:.2f}M + {c.n_experts}+{c.n_shared} experts x "
        f"{expert / 1e6:.2f}M + router and norms {rest / 1e6:.2f}M)\n  + embedding and head 2 x {c.vocab_size * c.dim / 1e6:.2f}M; "
        f"active per token: {c.top_k}+{c.n_shared} experts instead of {c.n_experts}+{c.n_shared}"
    )


if __name__ == "__main__":
    cli.run(main)
