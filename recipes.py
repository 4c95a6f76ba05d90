"""What each pre-training stage trains with: rows, context, learning rate, RoPE base, for every config (v2 §2.3; v3's six stages).

The tiny recipes keep the shape of the full ones and scale the numbers. Where the papers are silent the README says what was chosen.
"""

import math
from typing import NamedTuple


class Schedule(NamedTuple):
    """Learning rate in optimizer steps: linear warm-up to peak, cosine or a line to final. router: scale of alpha and beta.

    beta2: AdamW's memory of squared gradients. The report's 0.95 belongs to its batches of 24M tokens; ours of 2k are noisier and have
    0.99, which once paid (RESULTS.md, "What the tuning of `tiny` showed"). mtp_every: 2 interleaves steps with and without MTP (v3).
    """

    steps: int
    peak: float
    final: float
    warmup: int = 0
    router: tuple = (1.0, 1.0)  # at the first and the last step, linear between
    shape: str = "cosine"  # or "linear"
    beta2: float = 0.95
    mtp_every: int = 1  # multi-token prediction, where the config has it, in every so many steps; 0 for none
    base: str = ""  # the stage whose weights it starts from


def lr_at(step, schedule):
    """Learning rate of optimizer step `step` (0-based)."""
    if step < schedule.warmup:
        return schedule.peak * (step + 1) / schedule.warmup
    progress = min(1.0, (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup))
    left = 1 - progress if schedule.shape == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return schedule.final + (schedule.peak - schedule.final) * left


class Recipe(NamedTuple):
    """One stage: rows of seq_len tokens per step (micro_rows at a time on a rank), schedule, RoPE base; recompute: many ranks
    make the activations of blocks again in the backward pass, which plan.py counts on."""

    seq_len: int
    rows: int
    micro_rows: int
    schedule: Schedule
    rope_base: float = 10_000.0
    recompute: bool = False


# {config: {stage: Recipe}}. v2: rates 1 -> 0.1, 0.5 -> 0.1, 0.1 of the peak; batches of rows, 1.5 rows and 0.375 rows (`small`: fewer).
# v3: general, e-commerce and SEA ("market"), reasoning, long context in two steps ("extend", "long"), MTP interleaved, in every second
# step of the last; the report names these stages and the contexts 8K and 32K -> 128K, rates follow v2's proportions.
RECIPES = {
    "tiny": {
        "general": Recipe(256, 8, 8, Schedule(250, 3e-3, 3e-3 / 10, 25, (1.0, 0.1), beta2=0.99)),
        "anneal": Recipe(256, 12, 12, Schedule(100, 3e-3 / 2, 3e-3 / 10, 15, (0.1, 0.1), beta2=0.99)),
        "long": Recipe(1024, 3, 3, Schedule(30, 3e-3 / 10, 3e-3 / 10, 0, (0.1, 0.1), beta2=0.99), 1e6),
    },
    "tiny_v3": {
        "general": Recipe(256, 8, 8, Schedule(250, 3e-3, 3e-3 / 10, 25, (1.0, 0.1), beta2=0.99, mtp_every=0)),
        "market": Recipe(256, 8, 8, Schedule(80, 3e-3 / 2, 3e-3 / 10, 15, (0.1, 0.1), beta2=0.99, mtp_every=0)),
        "reasoning": Recipe(256, 8, 8, Schedule(40, 3e-3 / 10, 3e-3 / 10, 0, (0.1, 0.1), beta2=0.99, mtp_every=0)),
        "extend": Recipe(512, 5, 5, Schedule(20, 3e-3 / 10, 3e-3 / 10, 0, (0.1, 0.1), beta2=0.99, mtp_every=0), 1e6),
        "long": Recipe(1024, 3, 3, Schedule(20, 3e-3 / 10, 3e-3 / 10, 0, (0.1, 0.1), beta2=0.99, mtp_every=0), 1e7),
        "mtp": Recipe(1024, 3, 3, Schedule(40, 3e-3 / 10, 3e-3 / 10, 0, (0.1, 0.1), beta2=0.99, mtp_every=2), 1e7),
    },
    "small": {
        "general": Recipe(4096, 256, 4, Schedule(20_000, 6e-4, 6e-5, 600, (1.0, 0.1)), recompute=True),
        "anneal": Recipe(4096, 384, 4, Schedule(6000, 3e-4, 6e-5, 200, (0.1, 0.1)), recompute=True),
        "long": Recipe(32_768, 24, 1, Schedule(400, 6e-5, 6e-5, 0, (0.1, 0.1)), 1e6, recompute=True),
    },
    "v2_30b": {  # 8T tokens / (5760 x 4096), 4T / (8640 x 4096), and 2200 steps of 2160 x 32768
        "general": Recipe(4096, 5760, 6, Schedule(339_084, 3e-4, 3e-5, 3000, (1.0, 0.1)), recompute=True),
        "anneal": Recipe(4096, 8640, 6, Schedule(113_028, 1.5e-4, 3e-5, 2000, (0.1, 0.1)), recompute=True),
        "long": Recipe(32_768, 2160, 3, Schedule(2200, 3e-5, 3e-5, 0, (0.1, 0.1)), 1e6, recompute=True),
    },
    "v3_245b": {  # batches that 512 GPUs can share, of 50M and 67M tokens; 8T, 4T, 0.5T, then 74B in each step of the long context, 0.13T
        "general": Recipe(8192, 6144, 2, Schedule(158_946, 3e-4, 3e-5, 3000, (1.0, 0.1), mtp_every=0), recompute=True),
        "market": Recipe(8192, 6144, 2, Schedule(79_473, 1.5e-4, 3e-5, 2000, (0.1, 0.1), mtp_every=0), recompute=True),
        "reasoning": Recipe(8192, 6144, 2, Schedule(9_934, 3e-5, 3e-5, 0, (0.1, 0.1), mtp_every=0), recompute=True),
        "extend": Recipe(32_768, 2048, 1, Schedule(1100, 3e-5, 3e-5, 0, (0.1, 0.1), mtp_every=0), 1e6, recompute=True),
        "long": Recipe(131_072, 512, 1, Schedule(1100, 3e-5, 3e-5, 0, (0.1, 0.1), mtp_every=0), 1e7, recompute=True),
        "mtp": Recipe(131_072, 512, 1, Schedule(2000, 3e-5, 3e-5, 0, (0.1, 0.1), mtp_every=2), 1e7, recompute=True),
    },
}
