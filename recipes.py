"""What each pre-training stage trains with: rows, context, learning rate, RoPE base, for every config (v2 §2.3; v3's six stages).

The tiny recipes keep the shape of the full ones and scale the numbers. Where the papers are silent the README says what was chosen.

    python recipes.py      # prints the table
"""

import math
from typing import NamedTuple

import cli


class Schedule(NamedTuple):
    """Learning rate in optimizer steps: linear warm-up to peak, cosine or a line to final. router: scale of alpha and beta.

    beta2: AdamW's memory of squared gradients. The report's 0.95 belongs to its batches of 24M tokens; ours of 2k are noisier and
    want 0.99 (RESULTS.md, "What the tuning of `tiny` showed"). mtp_every: 2 interleaves steps with and without MTP (v3).
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


def _recipes(context, long_context, rows, micro_rows, steps, warmup, peak, long_rows, beta2=0.95, recompute=False):
    """general, anneal, long: rates 1 -> 0.1, 0.5 -> 0.1, 0.1 of the peak; batches of rows, 1.5 rows and long_rows (the report's: 0.375
    rows). micro_rows: of context, of long_context."""
    general, anneal, long = steps
    schedules = (
        Schedule(general, peak, peak / 10, warmup[0], (1.0, 0.1), beta2=beta2),
        Schedule(anneal, peak / 2, peak / 10, warmup[1], (0.1, 0.1), beta2=beta2),
        Schedule(long, peak / 10, peak / 10, 0, (0.1, 0.1), beta2=beta2),
    )
    return {
        "general": Recipe(context, rows, micro_rows[0], schedules[0], recompute=recompute),
        "anneal": Recipe(context, rows * 3 // 2, micro_rows[0], schedules[1], recompute=recompute),
        "long": Recipe(long_context, long_rows, micro_rows[1], schedules[2], 1e6, recompute),
    }


def _recipes_v3(contexts, rows, micro_rows, steps, warmup, peak, beta2=0.95, recompute=False):
    """v3's stages: general, e-commerce and SEA ("market"), reasoning, long context in two steps ("extend", "long"), MTP interleaved.

    contexts: of general, market and reasoning; of extend; of long and mtp. rows, micro_rows: of the same. The report names the stages
    and the contexts 8K and 32K -> 128K; rates follow v2's proportions, and the MTP block learns in every second step of the last.
    """
    fixed = Schedule(0, peak / 10, peak / 10, 0, (0.1, 0.1), beta2=beta2, mtp_every=0)
    schedules = {
        "general": Schedule(0, peak, peak / 10, warmup[0], (1.0, 0.1), beta2=beta2, mtp_every=0),
        "market": Schedule(0, peak / 2, peak / 10, warmup[1], (0.1, 0.1), beta2=beta2, mtp_every=0),
        "reasoning": fixed, "extend": fixed, "long": fixed, "mtp": fixed._replace(mtp_every=2),
    }  # fmt: skip
    shapes = [0, 0, 0, 1, 2, 2]
    return {
        stage: Recipe(contexts[i], rows[i], micro_rows[i], schedule._replace(steps=n), (1e4, 1e6, 1e7)[i], recompute)
        for (stage, schedule), n, i in zip(schedules.items(), steps, shapes, strict=True)
    }


RECIPES = {
    "tiny": _recipes(256, 1024, 8, (12, 3), (250, 100, 30), (25, 15), 3e-3, 3, 0.99),
    "tiny_v3": _recipes_v3((256, 512, 1024), (8, 5, 3), (8, 5, 3), (250, 80, 40, 20, 20, 40), (25, 15), 3e-3, 0.99),
    "small": _recipes(4096, 32768, 256, (4, 1), (20_000, 6000, 400), (600, 200), 6e-4, 24, recompute=True),
    # 8T tokens / (5760 x 4096), 4T / (8640 x 4096), and 2200 steps of 2160 x 32768
    "v2_30b": _recipes(4096, 32768, 5760, (6, 3), (339_084, 113_028, 2200), (3000, 2000), 3e-4, 2160, recompute=True),
    # batches that 512 GPUs can share, of 50M and 67M tokens; 8T, 4T, 0.5T, then 74B in each step of the long context and 0.13T
    "v3_245b": _recipes_v3(
        (8192, 32_768, 131_072), (6144, 2048, 512), (2, 1, 1), (158_946, 79_473, 9_934, 1100, 1100, 2000), (3000, 2000), 3e-4,
        recompute=True,
    ),  # fmt: skip
}


def main():
    cli.parse(__doc__)
    for config, recipes in RECIPES.items():
        for stage, r in recipes.items():
            s = r.schedule
            tokens = s.steps * r.rows * r.seq_len
            print(f"{config:8} {stage:9} {s.steps:7,} steps x {r.rows:5,} rows x {r.seq_len:7,} tokens = {tokens:.2e}, "
                  f"rate {s.peak:g} -> {s.final:g}, warm-up {s.warmup}, RoPE base {r.rope_base:g}")  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
