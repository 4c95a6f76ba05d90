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
from torch.distributed.tensor import DTensor

from checkpoint import ADAM, MANIFEST, discard, file_sha256, load_checkpoint, refuse_quantized
from cli import InputError, write_atomically
from parallel import packed_orders, sharded_like, whole_of


def tensors_of(model, optimizer):
    """({key: tensor} of weights and optimizer, under the keys of a checkpoint's shards; {key: row order} of what is reordered)."""
    tensors = {}
    for name, p in model.named_parameters():
        tensors[f"model.{name}"] = p.detach()
        if optimizer is not None:
            state = optimizer.state[p]
            if not state:
                state.update(step=torch.zeros((), device=p.device), **{kind: torch.zeros_like(p) for kind in ADAM[1:]})
            tensors.update({f"{kind}.{name}": state[kind] for kind in ADAM})
    return tensors, {f"{kind}.{name}": order for name, order in packed_orders(model).items() for kind in ("model", *ADAM[1:])}


def save_shards(path, model, optimizer, **known):
    """save_checkpoint by many ranks: a folder that appears whole or not at all, each rank's part in its own file."""
    (tensors, orders), temporary = tensors_of(model, optimizer), path + ".tmp"
    tensors = {key: sharded_like(whole_of(x, orders[key]), x, None) if key in orders else x for key, x in tensors.items()}
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
    dist.all_gather_object(found, [(name, file_sha256(os.path.join(temporary, name))) for name in files[dist.get_rank() :: len(found)]])
    if dist.get_rank() == 0:
        manifest = {"config": dataclasses.asdict(model.config), **known, "files": dict(sum(found, []))}
        write_atomically(os.path.join(temporary, MANIFEST), json.dumps(manifest).encode())
        if os.path.exists(path):  # torn, passed over when the run was resumed
            discard(path)
        os.rename(temporary, path)
    dist.barrier()


@torch.no_grad()
def restore(path, model, optimizer=None):
    """Load a checkpoint, a file or a folder of shards, into a parallelized model (and its optimizer)."""
    tensors, orders = tensors_of(model, optimizer)
    if os.path.isdir(path):
        found = {key: torch.empty_like(x) for key, x in tensors.items()}
        dcp.load(found, checkpoint_id=path)
    else:
        state = load_checkpoint(path)
        refuse_quantized(state)
        if optimizer is not None and state["optimizer"] is None:
            raise InputError(f"{path} holds weights only, as exports do: it cannot be resumed, only built on")
        found = {f"model.{name}": x for name, x in state["model"].items()}
        for name, state_of_p in (state["optimizer"] or {}).items():
            found.update({f"{kind}.{name}": x for kind, x in state_of_p.items()})
    for key, x in tensors.items():
        if key in found or key.startswith("model."):  # what never had a gradient has no moments in a file; here they are 0
            whole = found[key]
            if isinstance(whole, DTensor) and key in orders:
                whole = whole.full_tensor()
            x.copy_(whole if isinstance(whole, DTensor) or not x.dim() else sharded_like(whole.to(x.device), x, orders.get(key)))
