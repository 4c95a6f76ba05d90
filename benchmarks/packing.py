"""What packing buys: four ways to batch conversations, and trl's SFT trainer with packing, in valid tokens per second.

    pad to max    every conversation a row as wide as the context of the batch
    dynamic       random conversations, padded to the longest among them
    buckets       conversations of like length, padded to the longest (Distributed Dynamic Padding)
    packed        best-fit decreasing into rows, each conversation seeing only itself

All arms train the same model on the same conversations, answers only, about the same number of places a step, and take turns. trl
trains transformers' Qwen2-MoE of the same sizes, packed by its own best-fit decreasing, in three batch shapes with both of
transformers' experts implementations; its best counts.
Then: the loss of the same conversations packed and one a row; how full the bins are on three kinds of lengths, beside trl's and the
lower bound, and the time for a million lengths.

    python -m benchmarks.packing      # about 2 minutes on two cores
"""

import json
import random
import tempfile
import time

import torch

import cli
from benchmarks import keep, quartiles_of, shown
from benchmarks.moe import their_model
from compass import CONFIGS, Compass
from data import market
from data.tasks import training
from report import table
from sft import CAPACITY, ROWS, Chats, collate, curriculum, pack, sft_loss
from tokenizer import train as train_tokenizer
from train import _train_step, losses_of, make_optimizer

STEPS = 25
NAMES = ("tokens", "targets", "weights", "doc_ids", "positions")  # of what `collate` returns


def dynamic(lengths, places, rng):
    """Random batches of at most `places` places when padded to their longest."""
    order, batches, batch = list(range(len(lengths))), [], []
    rng.shuffle(order)
    for i in order:
        if batch and (len(batch) + 1) * max(lengths[j] for j in (*batch, i)) > places:
            batches.append(batch)
            batch = []
        batch.append(i)
    return [*batches, batch]


def our_arms(config, packed, padded):
    """{name: a callable that trains one step and returns (valid tokens, places)}, and the model of the packed arm."""
    rng, lengths = random.Random(0), [len(ids) for ids, _ in packed.samples]
    order = list(range(len(lengths)))
    rng.shuffle(order)
    rows = {
        "pad to max": ([order[i : i + ROWS] for i in range(0, len(order), ROWS)], packed.capacity),
        "dynamic": (dynamic(lengths, CAPACITY * ROWS, rng), None),
    }

    def fixed(chats, members, width):
        batch = dict(zip(NAMES, collate(chats.samples, [[i] for i in members], width or max(lengths[i] for i in members)), strict=True))
        return [{**batch, "domains": torch.zeros_like(batch["tokens"])}]

    batches = {name: (lambda step, b=b, width=width: fixed(packed, b[step], width)) for name, (b, width) in rows.items()}
    batches |= {"buckets": padded.batch, "packed": packed.batch}
    arms = {}
    for name, batch in batches.items():
        torch.manual_seed(0)
        model = Compass(config)
        optimizer, steps = make_optimizer(model), iter(range(10**6))

        def arm(model=model, optimizer=optimizer, steps=steps, batch=batch):
            made = batch(next(steps))
            _train_step(model, optimizer, made, sft_loss, 1e-4, torch.device("cpu"))
            valid = made[0]["doc_ids"] >= 0
            return int(valid.sum()), valid.numel()

        arms[name] = arm
    return arms, model  # packed is the last


@torch.no_grad()
def loss_difference(model, packed, bins=40):
    """The loss of the conversations in the first bins, packed and one a row, nats a target, and the largest difference of a target's."""
    members, losses = [i for unit in packed.units[:bins] for i in unit], {}
    for name, rows in (("packed", packed.units[:bins]), ("one a row", [[i] for i in members])):
        batch = dict(zip(NAMES, collate(packed.samples, rows, packed.capacity), strict=True))
        nll_BT = losses_of(model, batch).nll_BT
        losses[name] = nll_BT[batch["doc_ids"] >= 0]  # in the order of the members either way
    counted = losses["packed"] > 0
    means = {name: nll_N[counted].mean().item() for name, nll_N in losses.items()}
    return {"conversations": len(members), **means, "largest": (losses["packed"] - losses["one a row"]).abs().max().item()}


def trl_speed(config, samples, experts, rows, accumulate):
    """Valid tokens per second of trl's SFTTrainer in each of its steps but the first three."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        seconds = []

        def on_step_begin(self, *_, **__):
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            self.seconds.append(time.perf_counter() - self.began)

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))  # only asked for the padding's id
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            their_model(config, experts, "sdpa"),
            args=SFTConfig(
                folder, per_device_train_batch_size=rows, gradient_accumulation_steps=accumulate, max_length=CAPACITY, packing=True,
                max_steps=STEPS, use_cpu=True, report_to="none", save_strategy="no", logging_steps=1000, bf16=False, fp16=False,
                completion_only_loss=True, learning_rate=1e-4, gradient_checkpointing=False, optim="adamw_torch_fused", disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict(
                {"input_ids": [ids.tolist() for ids, _ in samples], "completion_mask": [mask.astype(int).tolist() for _, mask in samples]}
            ),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>"),
            callbacks=[clock],
        )  # fmt: skip
        packed = trainer.train_dataset
        trainer.train()
    per_row = sum(map(sum, packed["seq_lengths"])) / len(packed)
    return [per_row * rows * accumulate / seconds for seconds in clock.seconds[3:]]


def bins():
    """Bins on three kinds of lengths, 200,000 each: ours, trl's, the lower bound; and seconds for a million."""
    from datasets import Dataset
    from trl.data_utils import pack_dataset

    rng, n, capacity = random.Random(0), 200_000, 1024
    kinds = {
        "short": [rng.randint(8, 120) for _ in range(n)],
        "mixed": [min(capacity, int(rng.lognormvariate(5, 0.9)) + 4) for _ in range(n)],
        "long thoughts": [rng.randint(400, capacity) if rng.random() < 0.5 else rng.randint(10, 200) for _ in range(n)],
    }
    results = {}
    for name, lengths in kinds.items():
        theirs = pack_dataset(Dataset.from_dict({"input_ids": [[0] * length for length in lengths]}), capacity, strategy="bfd")
        bound = max(-(-sum(lengths) // capacity), sum(length > capacity / 2 for length in lengths))
        results[name] = {"ours": len(pack(lengths, capacity)), "trl": len(theirs), "bound": bound}
    million = [min(capacity, int(rng.lognormvariate(5, 0.9)) + 4) for _ in range(1_000_000)]
    began = time.perf_counter()
    pack(million, capacity)
    results["seconds for a million lengths"] = time.perf_counter() - began
    return results


def tables(results):
    (_, fast, _), bins, loss = results["valid tokens/s"]["packed"], dict(results["bins"]), results["loss"]
    arms = []
    for name, speed in results["valid tokens/s"].items():
        filled = f"{100 * results['filled'][name]:.1f}" if name in results["filled"] else ""
        arms.append([name, filled, shown(speed), f"{fast / speed[1]:.2f}"])
    seconds = bins.pop("seconds for a million lengths")
    filled = [[kind, *(f"{n:,}" for n in counts.values())] for kind, counts in bins.items()]
    return {
        "speed": table(arms, ["", "places filled, %", "valid tokens/s", "packed is so many times as fast"]),
        "loss": table(
            [[loss["conversations"], f"{loss['packed']:.6f}", f"{loss['one a row']:.6f}", f"{loss['largest']:.1e}"]],
            ["conversations", "loss packed, nats a target", "one a row", "largest difference of a target"],
        ),
        "bins": table(filled, ["200,000 lengths into bins of 1,024", "ours", "trl's", "lower bound"])
        + f"\n\nA million lengths take {seconds:.1f} s.",
    }


def main():
    cli.parse(__doc__)
    config = CONFIGS["tiny"]
    tokenizer = train_tokenizer(list(market.documents("general", 0, per_language=400)), config.vocab_size)
    chosen = curriculum("sft1", training(0, 300), 0)
    packed = Chats(chosen, tokenizer, CAPACITY, 0)
    arms, model = our_arms(config, packed, Chats(chosen, tokenizer, CAPACITY, 0, packed=False))
    speeds, seen = {name: [] for name in arms}, {name: [0, 0] for name in arms}
    for i in range(STEPS):
        for name, arm in arms.items():
            began = time.perf_counter()
            valid, places = arm()
            if i >= 3:
                speeds[name].append(valid / (time.perf_counter() - began))
                seen[name] = [seen[name][0] + valid, seen[name][1] + places]
    for experts in ("eager", "grouped_mm"):
        for rows, accumulate in ((ROWS, 1), (2, ROWS // 2), (1, ROWS)):
            speeds[f"trl, packed, {rows} x {accumulate} rows, {experts}"] = trl_speed(config, packed.samples, experts, rows, accumulate)
    results = {
        "valid tokens/s": quartiles_of(speeds),
        "filled": {name: valid / places for name, (valid, places) in seen.items()},
        "loss": loss_difference(model, packed), "bins": bins(),
    }  # fmt: skip
    print(json.dumps(results, indent=1))
    keep("packing", results)


if __name__ == "__main__":
    cli.run(main)
