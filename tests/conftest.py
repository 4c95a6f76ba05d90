"""Shared by the tests: a micro config, a small tokenizer, and a way to run our scripts as a user does."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from compass import CONFIGS, Compass
from data import market
from tokenizer import Tokenizer, train_bpe

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture
def micro_config():
    return dataclasses.replace(
        CONFIGS["tiny"], n_layers=2, dim=32, n_heads=4, n_kv_heads=2, head_dim=8, n_experts=4, top_k=2,
        expert_dim=16, vocab_size=512, max_seq_len=64,
    )  # fmt: skip


@pytest.fixture
def micro_model(micro_config):
    torch.manual_seed(0)
    return Compass(micro_config)


@pytest.fixture
def pair(micro_model):
    """Our micro model and transformers' Qwen2-MoE with the same weights (without shared experts)."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    c = dataclasses.replace(micro_model.config, n_shared=0)
    torch.manual_seed(0)
    ours = Compass(c)
    theirs = Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            vocab_size=c.vocab_size, hidden_size=c.dim, num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
            num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim, num_experts=c.n_experts, num_experts_per_tok=c.top_k,
            moe_intermediate_size=c.expert_dim, shared_expert_intermediate_size=1, norm_topk_prob=True,
            rms_norm_eps=c.norm_eps, tie_word_embeddings=False, qkv_bias=False, decoder_sparse_step=1, mlp_only_layers=[],
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_base}, attn_implementation="eager",
        )
    )  # fmt: skip
    H, G, C = c.n_heads, c.n_kv_heads, c.head_dim
    with torch.no_grad():
        theirs.model.embed_tokens.weight.copy_(ours.embedding.weight)
        theirs.lm_head.weight.copy_(ours.head.weight)
        theirs.model.norm.weight.copy_(ours.norm.weight)
        for block, layer in zip(ours.blocks, theirs.model.layers, strict=True):
            q, k, v = block.attention.qkv.weight.split((H * C, G * C, G * C))
            for name, w in (("q_proj", q), ("k_proj", k), ("v_proj", v), ("o_proj", block.attention.out.weight)):
                projection = getattr(layer.self_attn, name)
                projection.weight.copy_(w)
                if projection.bias is not None:
                    projection.bias.zero_()
            layer.input_layernorm.weight.copy_(block.attention_norm.weight)
            layer.post_attention_layernorm.weight.copy_(block.feed_forward_norm.weight)
            layer.mlp.gate.weight.copy_(block.feed_forward.router.weight)
            layer.mlp.experts.gate_up_proj.copy_(block.feed_forward.gate_up_ED2F.transpose(1, 2))
            layer.mlp.experts.down_proj.copy_(block.feed_forward.down_EFD.transpose(1, 2))
            layer.mlp.shared_expert.down_proj.weight.zero_()
    return ours, theirs


@pytest.fixture(scope="session")
def micro_tokenizer():
    return Tokenizer(train_bpe([d["text"] for d in market.documents("general", 0, per_language=30)], 500))


@pytest.fixture(scope="session")
def script():
    """Run `python <args>` in the repository; returns the finished process (text output)."""

    def call(*args, **kwargs):
        return subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True, **kwargs)

    return call
