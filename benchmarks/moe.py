"""Speed of the MoE layer, of permute/unpermute and of a whole training step, beside peers and limits measured in the same run.

The limit is this machine's fp32 rate on a 1024^3 matrix product. A training step of `tiny` counts 6 * (active parameters - embedding)
+ attention FLOPs a token. The peer is transformers' Qwen2-MoE of the same sizes, on the same tokens, under each of its
experts implementations and optimizer settings alike; its best counts. Arms take turns, nine rounds.

    python -m benchmarks.moe      # about 2 minutes on two cores
"""

import dataclasses
import json

import torch
from torch import nn

import cli
from benchmarks import best_peer, keep, quartiles, quartiles_of, ratios, shown, timed
from compass import CONFIGS, Compass, count_parameters
from kernels import permute, permute_reference, unpermute, unpermute_reference
from moe import MoE
from report import table
from train import CLIP, make_optimizer

ROWS, T, ROUNDS = 8, 256, 9


def matmul_rate():
    """A callable of one 1024^3 product, and its FLOPs."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return lambda: a @ b, 2 * 1024**3


def step_flops(config, tokens, length):
    """FLOPs of forward and backward: 6 per active parameter outside the embedding, and causal attention."""
    active = count_parameters(config)[1] - config.vocab_size * config.dim
    attention = 6 * config.n_layers * config.n_heads * config.head_dim * length  # QK and AV, half of the square, times three
    return tokens * (6 * active + attention)


def our_step(config):
    torch.manual_seed(0)
    model = Compass(config)
    optimizer = make_optimizer(model)
    tokens_BT = torch.randint(config.vocab_size, (ROWS, T))

    def step():
        optimizer.zero_grad(set_to_none=True)
        model.loss(tokens_BT, tokens_BT.roll(-1, 1)).total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    return step


def their_model(config, experts, attention):
    """Qwen2-MoE with the same layers, heads, experts and shared width, untied."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(0)
    c = config
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            vocab_size=c.vocab_size, hidden_size=c.dim, num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
            num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim, num_experts=c.n_experts, num_experts_per_tok=c.top_k,
            moe_intermediate_size=c.expert_dim, shared_expert_intermediate_size=max(1, c.n_shared * c.expert_dim), norm_topk_prob=True,
            tie_word_embeddings=False, qkv_bias=False, decoder_sparse_step=1, mlp_only_layers=[], output_router_logits=True,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_base}, attn_implementation=attention,
            experts_implementation=experts, use_cache=False,
        )
    )  # fmt: skip


@torch.no_grad()
def twin(ours):
    """Qwen2-MoE with the weights of `ours`, which must have no shared experts (theirs are gated); theirs are zeroed."""
    c = ours.config
    theirs = their_model(c, "eager", "eager")
    theirs.config.output_router_logits = False
    theirs.model.embed_tokens.weight.copy_(ours.embedding.weight)
    theirs.lm_head.weight.copy_(ours.head.weight)
    theirs.model.norm.weight.copy_(ours.norm.weight)
    for block, layer in zip(ours.blocks, theirs.model.layers, strict=True):
        q, k, v = block.attention.qkv.weight.split((c.n_heads * c.head_dim, *[c.n_kv_heads * c.head_dim] * 2))
        for name, w in (("q_proj", q), ("k_proj", k), ("v_proj", v), ("o_proj", block.attention.out.weight)):
            getattr(layer.self_attn, name).weight.copy_(w)
        layer.input_layernorm.weight.copy_(block.attention_norm.weight)
        layer.post_attention_layernorm.weight.copy_(block.feed_forward_norm.weight)
        layer.mlp.gate.weight.copy_(block.feed_forward.router.weight)
        layer.mlp.experts.gate_up_proj.copy_(block.feed_forward.gate_up_ED2F.transpose(1, 2))
        layer.mlp.experts.down_proj.copy_(block.feed_forward.down_EFD.transpose(1, 2))
        layer.mlp.shared_expert.down_proj.weight.zero_()
    return theirs


def their_step(config, experts, attention):
    model = their_model(config, experts, attention)
    optimizer = make_optimizer(model)
    tokens_BT = torch.randint(config.vocab_size, (ROWS, T))

    def step():
        optimizer.zero_grad(set_to_none=True)
        model(tokens_BT, labels=tokens_BT).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    return step


def naive(layer, x_ND):
    """The obvious MoE: for each expert, the tokens that chose it."""
    logits_NE, weights_NK, index_NK = layer.route(x_ND)
    y_ND = layer.shared(x_ND)
    for e in range(layer.n_experts):
        n, k = (index_NK == e).nonzero(as_tuple=True)
        gate, up = (x_ND[n] @ layer.gate_up_ED2F[e]).chunk(2, -1)
        y_ND = y_ND.index_add(0, n, (nn.functional.silu(gate) * up) @ layer.down_EFD[e] * weights_NK[n, k].unsqueeze(-1))
    return y_ND


def layer_arms(config, tokens=4096):
    """Forward and backward of one layer: ours, the naive loop, and the dense products alone (the limit)."""
    torch.manual_seed(0)
    layer = MoE(config)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.05)
    x_ND = torch.randn(tokens, config.dim)
    width = (config.top_k + config.n_shared) * config.expert_dim
    up, down = nn.Linear(config.dim, 2 * width, bias=False), nn.Linear(width, config.dim, bias=False)

    def run(forward, module):
        module.zero_grad(set_to_none=True)
        forward(x_ND.requires_grad_()).square().mean().backward()

    dense = nn.ModuleList((up, down))
    return {
        "ours": lambda: run(lambda x: layer(x[None])[0], layer),
        "naive loop": lambda: run(lambda x: naive(layer, x), layer),
        "its dense products alone": lambda: run(lambda x: down(up(x)[:, :width]), dense),
    }


def permute_arms(N=8192, D=512, E=32, K=4):
    x_ND, weights_NK = torch.randn(N, D), torch.rand(N, K)
    index_NK = torch.rand(N, E).topk(K).indices

    def pair(there, back):
        x_RD, row_of_NK, _ = there(x_ND, index_NK, E)
        back(x_RD, row_of_NK, weights_NK)

    def cat_style():
        """What is often written: the rows of each expert picked and concatenated, the results added back one expert at a time."""
        picked = [(index_NK == e).nonzero(as_tuple=True) for e in range(E)]
        x_RD = torch.cat([x_ND.index_select(0, n) for n, _ in picked])
        y_ND, start = torch.zeros(N, D), 0
        for n, k in picked:
            y_ND.index_add_(0, n, x_RD[start : start + len(n)] * weights_NK[n, k].unsqueeze(-1))
            start += len(n)

    return {
        "ours": lambda: pair(permute, unpermute),
        "index_select twin": lambda: pair(permute_reference, unpermute_reference),
        "cat and index_add": cat_style,
    }


def tables(results):
    def in_ms(what, seconds):
        return table([["ms", *(shown(found, scale=1e3) for found in seconds.values())]], [what, *seconds])

    step = results["training step of tiny"]
    seconds = step["seconds"]
    cells = [shown(seconds[name], scale=1e3) for name in ("ours", step["best peer"])] + [shown(step["times as fast"], 2)]
    cells += [shown(step["matmul GFLOP/s"]), shown(step["share of the matmul rate"], scale=100)]
    header = ["ours, ms", "transformers at its best, ms", "times as fast", "matrix products, GFLOP/s", "our share of that rate, %"]
    return {
        "step": table([cells], header),
        "layer": in_ms("one layer, 4,096 tokens", results["layer, 4096 tokens"]),
        "experts": in_ms("number of experts, 16,384 tokens", results["layer by number of experts, 16384 tokens"]),
        "permute": in_ms("permute and unpermute", results["permute and unpermute"]),
    }


def main():
    cli.parse(__doc__)
    product, flops = matmul_rate()
    config, results = CONFIGS["tiny"], {"threads": torch.get_num_threads()}
    arms = {"matmul": product, "ours": our_step(config)}
    for experts in ("eager", "batched_mm", "grouped_mm"):
        arms[f"transformers {experts}"] = their_step(config, experts, "sdpa")
    seconds = timed(arms, ROUNDS)
    peer, share = best_peer(seconds), step_flops(config, ROWS * T, T) / flops
    results["training step of tiny"] = {
        "seconds": quartiles_of(seconds), "best peer": peer,
        "times as fast": ratios(seconds[peer], seconds["ours"]), "matmul GFLOP/s": quartiles([flops / s / 1e9 for s in seconds["matmul"]]),
        "share of the matmul rate": [share * ratio for ratio in ratios(seconds["matmul"], seconds["ours"])],
    }  # fmt: skip
    by_experts = {E: layer_arms(dataclasses.replace(config, n_experts=E), tokens=16384)["ours"] for E in (8, 16, 32, 64)}
    for what, arms in (
        ("layer, 4096 tokens", layer_arms(config)), ("layer by number of experts, 16384 tokens", by_experts),
        ("permute and unpermute", permute_arms()),
    ):  # fmt: skip
        results[what] = quartiles_of(timed(arms, ROUNDS))
    print(json.dumps(results, indent=1))
    keep("moe", results)


if __name__ == "__main__":
    cli.run(main)
