"""Checkpoints that survive being killed, and the run folder they live in.

A run folder holds tokenizer.tiktoken, <stage>/step_N.pt, metrics.jsonl and the report. A checkpoint is written to a temporary file, synced,
and renamed; its last 32 bytes are the SHA-256 of the rest. It holds full-precision weights and the optimizer's state, so resuming is exact.

    python checkpoint.py --run runs/demo                                # lists what the run holds and verifies every checkpoint
    python checkpoint.py --run runs/pretrained --export checkpoints/x   # the last stage alone, bf16, with its log and report
"""

import dataclasses
import glob
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import warnings

import torch

import cli
from cli import InputError, write_atomically, write_jsonl
from compass import Compass, CompassConfig

# in training order; the command that makes each stage
STAGES = {
    "general": "python train.py", "anneal": "python train.py --stage anneal", "market": "python train.py --config tiny_v3 --stage market",
    "reasoning": "python train.py --config tiny_v3 --stage reasoning", "extend": "python train.py --config tiny_v3 --stage extend",
    "long": "python train.py --stage long", "mtp": "python train.py --config tiny_v3 --stage mtp",
    "sft1": "python sft.py", "pairs": "python sft.py --stage pairs", "drills": "python sft.py --stage drills",
    "sft2": "python sft.py --stage sft2", "dpo": "python dpo.py", "otpo": "python otpo.py",
}  # fmt: skip
KEEP = 2  # checkpoints per stage; the older one serves when the newer is torn
MANIFEST, ADAM = "manifest.json", ("step", "exp_avg", "exp_avg_sq")  # of a checkpoint that is a folder of shards
LOGGED, LAST = 100, 50  # an exported log keeps one step in so many, and of each stage the last, whose mean loss is reported


def save_checkpoint(path, model, *, optimizer=None, step=0, planned=0, stage="", base="", tokenizer_hash="", seed=0, data=None):
    """Save model, config, optimizer and where the run stands, at `step` of `planned`, in a stage that began from the stage `base`, on
    data whose first row has the checksum `data`."""
    buffer = io.BytesIO()
    torch.save(
        {
            "model": model.state_dict(), "config": dataclasses.asdict(model.config),
            "optimizer": {name: optimizer.state[p] for name, p in model.named_parameters()} if optimizer else None,
            "step": step, "planned": planned, "stage": stage, "base": base, "tokenizer_hash": tokenizer_hash, "seed": seed,
            "data": data,
        },
        buffer,
    )  # fmt: skip
    content = buffer.getvalue()
    if os.path.isdir(path):
        discard(path)
    write_atomically(path, content + hashlib.sha256(content).digest())


def load_checkpoint(path, device="cpu", weights=True):
    """Return the dict that `save_checkpoint` wrote: model, config, optimizer, step, planned, stage, base, tokenizer_hash, seed, data.

    A folder of shards, which many ranks wrote (resharding.save_shards), is put together to the same dict; without `weights` only what
    is small is read of it. Raises InputError naming the file when it is missing, torn (checksum) or not one of ours.
    """
    if not os.path.exists(path):
        raise InputError(f"{path} not found")
    if os.path.isdir(path):
        return load_shards(path, device) if weights else verified_manifest(path)
    with open(path, "rb") as file:
        content = file.read()
    content, digest = content[:-32], content[-32:]
    if not content or hashlib.sha256(content).digest() != digest:
        raise InputError(f"{path} is torn or foreign: its checksum does not match its content")
    return torch.load(io.BytesIO(content), map_location=device, weights_only=True)


def read_manifest(path):
    """The manifest of a folder of shards, all but the tensors: config, step, stage, seed, checksums of the files."""
    try:
        with open(os.path.join(path, MANIFEST), encoding="utf-8") as file:
            manifest = json.load(file)
            return {**manifest, "files": dict(manifest["files"])}
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path} is torn or foreign: its {MANIFEST} is missing or unreadable") from None


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verified_manifest(path):
    """The manifest of a folder of shards whose files match it. Many ranks ask together: each reads its share of the files, and what one
    finds wrong all raise."""
    several = torch.distributed.is_initialized()
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if several else (0, 1)
    problems = [None] * world
    try:
        manifest = read_manifest(path)
        for name, expected in list(manifest["files"].items())[rank::world]:
            file = os.path.join(path, name)
            if not os.path.exists(file) or file_sha256(file) != expected:
                raise InputError(f"{path} is torn or foreign: the checksum of {name} does not match its content")
    except InputError as error:
        problems[rank] = str(error)
    if several:
        torch.distributed.all_gather_object(problems, problems[rank])
    if problem := next(filter(None, problems), None):
        raise InputError(problem)
    return manifest


def load_shards(path, device):
    """The whole of a folder of shards, in this process, as `load_checkpoint` returns it."""
    from torch.distributed import checkpoint as dcp  # takes a second, which runs without shards need not wait for

    state = verified_manifest(path)
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {key: torch.empty(about.size, dtype=about.properties.dtype) for key, about in stored.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it should be
        dcp.load(tensors, checkpoint_id=path, no_dist=True)
    tensors = {key: tensor.to(device) for key, tensor in tensors.items()}
    model = {key.removeprefix("model."): tensor for key, tensor in tensors.items() if key.startswith("model.")}
    return {**state, "model": model, "optimizer": {name: {kind: tensors[f"{kind}.{name}"] for kind in ADAM} for name in model}}


def checksum(path):
    """The checksum a checkpoint ends with, as text: equal for equal weights and training state."""
    if os.path.isdir(path):
        return hashlib.sha256(json.dumps(read_manifest(path), sort_keys=True).encode()).hexdigest()
    with open(path, "rb") as file:
        file.seek(-32, os.SEEK_END)
        return file.read().hex()


def checkpoints(run, stage):
    """Paths of a stage's checkpoints, newest first."""
    found = glob.glob(os.path.join(glob.escape(run), stage, "step_*.pt"))
    numbered = [(int(m[1]), path) for path in found if (m := re.search(r"step_(\d+)\.pt$", path))]
    return [path for _, path in sorted(numbered, reverse=True)]


def begun(run, stage, resume):
    """Whether a stage has checkpoints to go on from. Raises InputError where it has and is not to be resumed."""
    found = bool(checkpoints(run, stage))
    if found and not resume:
        raise InputError(f"{run}/{stage} already holds checkpoints: pass --resume to go on, or another --run")
    return found


def refuse_occupied(folder):
    """Raise InputError where a folder to be written is a run of its own, whose tokenizer and log would be lost."""
    held = [f"a checkpoint of {stage}" for stage in ("reward", *STAGES) if checkpoints(folder, stage)]
    held = held or [name for name in ("metrics.jsonl", "tokenizer.tiktoken") if os.path.exists(os.path.join(folder, name))]
    if held:
        raise InputError(f"{folder} already holds {held[-1]}: name another folder, or delete it")


def load_latest(run, stage, device="cpu", weights=True):
    """The newest intact checkpoint of a stage, with its "path" and "origin", a name that another training of the same stage has not;
    torn ones are named and passed over."""
    paths = checkpoints(run, stage)
    for path in paths:
        try:
            # stage: the folder's name, where someone has renamed it
            return {**load_checkpoint(path, device, weights), "stage": stage, "path": path, "origin": f"{stage} {checksum(path)[:8]}"}
        except InputError as error:
            print(f"{error}; trying the one before it")
    problem = "holds no intact checkpoint: delete its step_*.pt and" if paths else "not found:"
    maker = {**STAGES, "reward": "python reward.py"}.get(stage.partition("/")[0])
    if not maker:
        raise InputError(f"{run}/{stage} not found; the stages are {', '.join(STAGES)}, reward")
    if paths and os.path.exists(os.path.join(run, "quantization.json")):
        raise InputError(f"{run}/{stage} holds no intact checkpoint: delete {run} and make it again with quantize.py")
    raise InputError(f"{run}/{stage} {problem} run `{maker} --run {run}` first")


def latest_stage(run, among=STAGES):
    """The last of some stages, in training order, that has a checkpoint."""
    done = [stage for stage in among if checkpoints(run, stage)]
    if not done:
        raise InputError(f"{run} holds no checkpoint of {', '.join(among)}: run `{STAGES[list(among)[0]]} --run {run}` first")
    return done[-1]


def is_quantized(state):
    """Whether a checkpoint dict holds quantized weights (quantize.py)."""
    return any(name.endswith((".qweight", ".weight_fp8")) for name in state["model"])


def refuse_quantized(state):
    """Raise InputError where a checkpoint's weights are quantized: those only answer (generate.py, evaluate.py)."""
    if is_quantized(state):
        raise InputError(f"this checkpoint of {state['stage']} is quantized and can only answer: train on in the run it was made from")


def load_weights(model, state):
    """Load a checkpoint dict's weights into a model. Raises InputError naming a tensor that does not fit or is not finite."""
    found, own, path = state["model"], model.state_dict(), state.get("path", "checkpoint")
    for name in [*own, *(found.keys() - own.keys())]:
        have, need = (tuple(tensors[name].shape) if name in tensors else "none" for tensors in (found, own))
        if have != need:
            raise InputError(f"{path}: tensor {name} has shape {have}, need {need}: made by another version of this program?")
        if not found[name].isfinite().all():
            raise InputError(f"{path}: tensor {name} is not finite: training diverged, or the file is damaged")
    model.load_state_dict(found)


def load_model(state, device="cpu", **changes):
    """Build the model a checkpoint dict describes (config fields may be changed) and load its weights.

    Raises InputError where the weights are quantized, a reward model's, do not fit or are not finite.
    """
    refuse_quantized(state)
    if "value.weight" in state["model"]:
        raise InputError(f"stage {state['stage']} is a reward model, which judges answers and gives none: name another --stage")
    model = Compass(CompassConfig(**{**state["config"], **changes}))
    load_weights(model, state)
    return model.to(device)


def changed_fields(begun, config):
    """["field old, now new", …] of a checkpoint's config (a dict) and another."""
    return [f"{name} {begun[name]}, now {value}" for name, value in dataclasses.asdict(config).items() if begun.get(name, value) != value]


def inherit(state, tokenizer, to_train=False):
    """Print what a later stage takes over; refuse another tokenizer than the one the weights were trained with, and to train on
    what was stopped halfway."""
    if state["tokenizer_hash"] != tokenizer.hash:
        raise InputError(
            f"the tokenizer (hash {tokenizer.hash[:12]}) is not the one that {state['stage']} was trained with "
            f"({state['tokenizer_hash'][:12]}); retrain, or put the old tokenizer back"
        )
    if to_train and state["step"] < state.get("planned", 0):
        raise InputError(
            f"{state['stage']} was stopped at step {state['step']} of {state['planned']}: finish it with "
            f"`{STAGES.get(state['stage'], 'its script')}` and --resume first"
        )
    c = state["config"]
    print(
        f"inherited from {state['stage']} step {state['step']}: {c['n_layers']} layers, dim {c['dim']}, {c['n_experts']} experts "
        f"top-{c['top_k']} +{c['n_shared']}, context {c['max_seq_len']}, RoPE base {c['rope_base']:g}, tokenizer {tokenizer.hash[:12]}"
    )


def discard(path):
    """Delete a checkpoint, a file or a folder of shards."""
    shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)


def prune(run, stage):
    """Delete all but the newest KEEP checkpoints of a stage."""
    for path in checkpoints(run, stage)[KEEP:]:
        discard(path)


def read_metrics(run):
    """The objects of metrics.jsonl; a last line torn by a kill is left out. Raises InputError naming a line that is damaged."""
    path, entries = os.path.join(run, "metrics.jsonl"), []
    if not os.path.exists(path):
        return entries
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                try:
                    entry = json.loads(line)
                    entries.append({"stage": entry["stage"], "step": entry["step"], **entry})
                except (ValueError, KeyError, TypeError):
                    raise InputError(f"{path}:{number}: damaged, not a step of training: {line[:60]!r}") from None
    return entries


def rewind_metrics(run, stage, step):
    """Drop a stage's entries from `step` on, so that a resumed run writes each step once. A log without any is left alone: another script
    may be writing to it."""
    kept = [entry for entry in read_metrics(run) if entry["stage"] != stage or entry["step"] < step]
    path, content = os.path.join(run, "metrics.jsonl"), "".join(json.dumps(entry) + "\n" for entry in kept).encode()
    if not os.path.exists(path) or file_sha256(path) != hashlib.sha256(content).hexdigest():
        write_atomically(path, content)


def export(run, folder):
    """Write the last stage's model in bf16, without optimizer, as a run folder of its own, to go on from with --run.

    Beside it the tokenizer, report and plots, metrics.jsonl (every LOGGED-th step and each stage's LAST) and origin.json: stage, step,
    seed, git commit.
    """
    stage = latest_stage(run)
    state = load_latest(run, stage)
    refuse_occupied(folder)
    model = load_model(state).to(torch.bfloat16)
    os.makedirs(folder, exist_ok=True)
    for name in sorted(os.listdir(run)):
        if name.startswith(("tokenizer.", "report.")) or name.endswith(".png"):
            shutil.copy(os.path.join(run, name), folder)
    metrics = read_metrics(run)
    ends = {entry["stage"]: entry["step"] - LAST for entry in metrics}
    kept = [entry for entry in metrics if entry["step"] % LOGGED == 0 or entry["step"] > ends[entry["stage"]]]
    write_jsonl(os.path.join(folder, "metrics.jsonl"), kept)
    here = os.path.dirname(os.path.abspath(__file__))
    asked = shutil.which("git") and subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=here).stdout.strip()
    origin = {"stage": stage, "step": state["step"], "seed": state["seed"], "commit": asked or "not known"}
    write_atomically(os.path.join(folder, "origin.json"), json.dumps(origin, indent=1).encode())
    path = os.path.join(folder, stage, f"step_{state['step']}.pt")
    known = {key: state[key] for key in ("step", "base", "tokenizer_hash", "seed")}
    save_checkpoint(path, model, stage=stage, **known)
    if state["step"] < state.get("planned", 0):
        print(f"{stage} was stopped at step {state['step']} of {state['planned']}, which the exported checkpoint does not say")
    size = sum(os.path.getsize(os.path.join(where, name)) for where, _, names in os.walk(folder) for name in names)
    print(f"{path}: {stage} of {run} in bf16; the folder has {size / 1e6:.1f} MB")


def main():
    args = cli.parse(__doc__, "run", export=dict(help="folder to write the last stage to, in bf16 and without optimizer"))
    if args.export:
        return export(args.run, args.export)
    torn = []
    for stage in (*STAGES, "reward", "reward/*", "dpo/*", "otpo/*"):  # members and rounds lie in folders of their own
        for path in checkpoints(args.run, stage):
            try:
                seed = load_checkpoint(path, weights=False)["seed"]
            except InputError as error:
                torn.append(str(error))
                continue
            size = sum(map(os.path.getsize, glob.glob(os.path.join(glob.escape(path), "**"), include_hidden=True) or [path]))
            print(f"{path}: intact, seed {seed}, {size / 1e6:.1f} MB")
    if torn:
        raise InputError("\n".join(torn))
    print(f"last stage, in training order: {latest_stage(args.run)}")


if __name__ == "__main__":
    cli.run(main)
