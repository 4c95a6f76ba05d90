"""Shared by the tests: a micro config, a small tokenizer, and a way to run our scripts as a user does."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from benchmarks.moe import twin
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


@pytest.fixture(params=(1e4, 1e6), ids=("base 1e4", "base 1e6"))
def pair(micro_model, request):
    """Our micro model and transformers' Qwen2-MoE with the same weights (without shared experts), before and after ABF."""
    torch.manual_seed(0)
    ours = Compass(dataclasses.replace(micro_model.config, n_shared=0, rope_base=request.param))
    return ours, twin(ours)


@pytest.fixture(scope="session")
def micro_tokenizer():
    return Tokenizer(train_bpe([d["text"] for d in market.documents("general", 0, per_language=30)], 500))


@pytest.fixture(scope="session")
def script():
    """Run `python <args>` in the repository; returns the finished process (text output)."""

    def call(*args, **kwargs):
        return subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True, **kwargs)

    return call
