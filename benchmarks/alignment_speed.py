"""Two speeds that alignment lives on, each beside its peer in the same run.

OTPO's token weights, one batched solve, against POT's unbalanced Sinkhorn pair by pair (batch 64, answers of up to 256 tokens). And n = 32
answers of 48 tokens, sampled as online DPO samples, from one shared prompt cache, against transformers' generate with the same weights and
settings; it has no ungated shared experts, so our model has none here. Arms take turns, five rounds.

    python -m benchmarks.alignment_speed      # about two minutes
"""

from dataclasses import replace

import numpy as np
import torch

import cli
from benchmarks import best_peer, keep, quartiles_of, ratios, shown, timed
from benchmarks.generation import endless_tokenizer
from benchmarks.moe import twin
from compass import CONFIGS, Compass
from dpo import EXPLORING
from generate import generate
from otpo import ot_token_weights
from report import table

B, T, D, N, PROMPTS, NEW, ROUNDS = 64, 256, 128, 32, (128, 768), 48, 5


def transport_arms():
    """Ours, and POT: plain and in its log domain in fp64, as its users run it, and plain in fp32 with distances as quick as ours."""
    import ot

    g = torch.Generator().manual_seed(0)
    states = [torch.randn(B, T, D, generator=g) for _ in range(2)]
    masks = [(torch.arange(T) < torch.randint(T // 4, T + 1, (B, 1), generator=g)).float() for _ in range(2)]

    def pot(method, quick=False):
        def arm():
            weights = []
            for h_c, h_r, m_c, m_r in zip(*states, *masks, strict=True):
                h_c, h_r = (h[m > 0] if quick else h[m > 0].double() for h, m in ((h_c, m_c), (h_r, m_r)))
                cost = torch.cdist(h_c, h_r, compute_mode=f"{'' if quick else 'donot_'}use_mm_for_euclid_dist")
                cost = (cost / cost.max().clamp_min(1)).numpy()
                ones = (np.ones(n, cost.dtype) for n in cost.shape)
                plan = ot.unbalanced.sinkhorn_unbalanced(
                    *ones, cost, 1.0, 0.2, method=method, reg_type="entropy", stopThr=1e-6 if quick else 1e-9
                )  # fmt: skip
                tau = min(len(h_c), len(h_r)) / plan.sum()
                weights.append((tau * plan.sum(1), tau * plan.sum(0)))
            return weights

        return arm

    def ours():
        return ot_token_weights(*states, *masks)

    w_c, w_r = ours()
    worst = max(
        np.abs(side[b, : len(theirs)].numpy() - theirs).max()
        for b, pair in enumerate(pot("sinkhorn")()) for side, theirs in zip((w_c, w_r), pair, strict=True)
    )  # fmt: skip
    print(f"largest difference of a weight: {worst:.1e}")
    return {
        "ours, batched, fp32": ours, "POT, pair by pair, fp32": pot("sinkhorn", quick=True), "POT, fp64": pot("sinkhorn"),
        "POT, log domain, fp64": pot("sinkhorn_stabilized"),
    }  # fmt: skip


def sampling_arms(length):
    """Ours and transformers' experts and attention implementations on a prompt of `length` tokens."""
    torch.manual_seed(0)
    config = replace(CONFIGS["tiny"], n_shared=0, max_seq_len=1024)
    model = Compass(config).eval()
    tokenizer = endless_tokenizer(config.vocab_size)
    theirs = twin(model).eval()
    prompt_T = torch.randint(300, (length,))

    def ours():
        return generate(model, tokenizer, [prompt_T.tolist()], replace(EXPLORING, max_tokens=NEW), N)

    def peer(experts, attention):
        def arm():
            theirs.set_experts_implementation(experts)
            theirs.set_attn_implementation(attention)
            with torch.inference_mode():
                return theirs.generate(
                    prompt_T.unsqueeze(0), attention_mask=torch.ones(1, length), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                    num_return_sequences=N, max_new_tokens=NEW, min_new_tokens=NEW, use_cache=True, pad_token_id=0,
                )  # fmt: skip

        return arm

    assert all(len(completion.ids) == NEW for completion in ours())
    arms = {f"transformers, {e}, {a}": peer(e, a) for e in ("eager", "grouped_mm") for a in ("eager", "sdpa")}
    return {"ours, shared prompt": ours, **arms}


def tables(results):
    seconds, times = results["transport"]["seconds"], results["transport"]["times ours"]
    transport = [[name, shown(found, scale=1e3), shown(times[name], 1)] for name, found in seconds.items()]
    sampling = []
    for length in PROMPTS:
        found = results[f"sampling after {length} tokens"]
        peer, (ours, *_) = found["best peer"], found["seconds"].values()
        cells = shown(ours, 2), shown(found["seconds"][peer], 2), shown(found["times ours"][peer], 1)
        sampling.append([f"after {length} tokens", *cells])
    return {
        "transport": table(transport, [f"token weights of {B} pairs of up to {T} tokens", "ms", "times ours"]),
        "sampling": table(sampling, [f"{N} answers of {NEW} tokens", "ours, s", "transformers at its best, s", "ratio"]),
    }


def main():
    cli.parse(__doc__)
    results = {"threads": torch.get_num_threads()}
    groups = {"transport": transport_arms(), **{f"sampling after {length} tokens": sampling_arms(length) for length in PROMPTS}}
    for what, arms in groups.items():
        seconds = timed(arms, ROUNDS)
        ours, *_ = seconds.values()
        found = results[what] = {
            "seconds": quartiles_of(seconds),
            "times ours": {name: ratios(rounds, ours) for name, rounds in seconds.items()},
        }  # fmt: skip
        if what != "transport":
            found["best peer"] = best_peer(seconds)
        for name, rounds in found["seconds"].items():
            print(f"{what:27} {name:36} {shown(rounds, 3):>24} s, {shown(found['times ours'][name], 1)} times ours")
    keep("alignment_speed", results)


if __name__ == "__main__":
    cli.run(main)
