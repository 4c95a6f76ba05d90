"""Checkpoints of many ranks: a folder of shards that any number of ranks, in any layout, and a single process can load.

Every rank writes its shards into its own file (torch.distributed.checkpoint); a manifest with everything small and the files'
checksums comes last, and the folder gets its name only when all is there. Tensors lie in it as a single process has them, whatever
tensor parallelism did to their rows.

    torchrun --nproc-per-node 4 -- train.py --parallel ep=2 --stage general --run runs/two    # writes runs/two/general/step_N.pt/
    torchrun --nproc-per-node 2 -- train.py --stage anneal --run runs/two    # two ranks go on from it; so does `python train.py`
"""

import dataclasses
import json
import os
import shutil

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from checkpoint import MANIFEST, MOMENTS, discard, file_sha256, load_checkpoint, read_manifest, refuse_quantized, write_atomically
from cli import InputError
from compass import Compass
from parallel import packed_orders, sharded_like, unpacked


def tensors_of(model, optimizer):
    """{key: DTensor} of weights and moments, under the keys of a checkpoint's shards."""
    tensors = {}
    for name, p in model.named_parameters():
        tensors[f"model.{name}"] = p.detach()
        if optimizer is not None:
            state = optimizer.state[p]
            if not state:
                state.update(step=torch.zeros((), device=p.device), **{kind: torch.zeros_like(p) for kind in MOMENTS})
            tensors.update({f"{kind}.{name}": state[kind] for kind in MOMENTS})
    return tensors


def save_shards(path, model, optimizer, *, step, planned=0, stage, base="", tokenizer_hash="", seed=0, data=None):
    """save_checkpoint by many ranks: a folder that appears whole or not at all, each rank's part in its own file."""
    orders, temporary = packed_orders(model), path + ".tmp"
    tensors = {key: unpacked(x, orders.get(key.partition(".")[2])) for key, x in tensors_of(model, optimizer).items()}
    if dist.get_rank() == 0 and os.path.exists(temporary):  # what a killed save left, of many ranks or of one
        discard(temporary)
    dist.barrier()
    try:
        dcp.save(tensors, checkpoint_id=temporary)
    except CheckpointException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = next(iter(error.failures.values()))[0]
        raise InputError(f"{path}: could not be written ({reason}); the earlier checkpoints are intact") from None
    files, found = sorted(os.listdir(temporary)), [None] * dist.get_world_size()
    files = {name: file_sha256(os.path.join(temporary, name)) for name in files[dist.get_rank() :: len(found)]}
    steps = {name: optimizer.state[p]["step"].item() for name, p in model.named_parameters()}
    dist.all_gather_object(found, (files, steps))
    if dist.get_rank() == 0:
        files, steps = ({key: value for part in found for key, value in part[i].items()} for i in range(2))
        by_decay = {g["weight_decay"]: {k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups}
        manifest = {
            "config": dataclasses.asdict(model.config), "step": step, "planned": planned, "stage": stage, "base": base,
            "tokenizer_hash": tokenizer_hash, "seed": seed, "data": data,
            "names": names_of(model), "settings": [by_decay[d] for d in sorted(by_decay, reverse=True)],
            "optimizer_steps": steps, "files": files,
        }  # fmt: skip
        write_atomically(os.path.join(temporary, MANIFEST), json.dumps(manifest).encode())
        if os.path.exists(path):  # torn, passed over when the run was resumed
            discard(path)
        os.rename(temporary, path)
    dist.barrier()


def names_of(model):
    """Names of the whole model's parameters, in order; a rank of a pipeline has some of them only."""
    if model.ranks.layout.pp > 1:
        with torch.device("meta"):
            model = Compass(model.config)
    return [name for name, _ in model.named_parameters()]


@torch.no_grad()
def restore(path, model, optimizer=None):
    """Load a checkpoint, a file or a folder of shards, into a parallelized model (and its optimizer)."""
    orders, tensors = packed_orders(model), tensors_of(model, optimizer)
    if not os.path.isdir(path):
        state = load_checkpoint(path)
        refuse_quantized(state)
        if optimizer is not None and state["optimizer"] is None:
            raise InputError(f"{path} holds weights only, as exports do: it cannot be resumed, only built on")
        whole = {f"model.{name}": x for name, x in state["model"].items()}
        names = sorted(state["model"], key=lambda name: state["model"][name].dim() < 2)  # the optimizer's order: matrices, vectors
        for i, name in enumerate(names if optimizer is not None else ()):
            none = torch.zeros_like(whole[f"model.{name}"])
            moments = state["optimizer"]["state"].get(i) or {"step": torch.zeros(()), **dict.fromkeys(MOMENTS, none)}
            whole.update({f"{kind}.{name}": moments[kind] for kind in MOMENTS})
            state.setdefault("optimizer_steps", {})[name] = moments["step"].item()
        for key, x in tensors.items():
            x.copy_(sharded_like(whole[key].to(x.device), x, orders.get(key.partition(".")[2])))
    else:
        state = read_manifest(path)
        loaded = {key: torch.empty_like(x) for key, x in tensors.items()}
        dcp.load(loaded, checkpoint_id=path)
        for key, x in tensors.items():
            order = orders.get(key.partition(".")[2])
            x.copy_(loaded[key] if order is None else sharded_like(loaded[key].full_tensor(), x, order))
    if optimizer is not None:
        for name, p in model.named_parameters():
            optimizer.state[p]["step"].fill_(state["optimizer_steps"][name])
