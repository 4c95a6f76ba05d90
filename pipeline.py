"""Pipeline parallelism: stages of layers on different ranks, micro-batches flowing through them (1F1B, or interleaved: VPP).

Each rank of the pp axis holds one run of layers (vpp runs, interleaved); the first also the embedding, the last the norm, the
head and the MTP blocks. These need embeddings of later tokens: they travel beside the hidden state, so that no parameter lives
twice. The aux and z losses are not sent on: `_Inject` hands the hidden state through unchanged and, in the backward pass, starts
the backward of these losses. All other axes work inside the stages as in parallel.py, and the sums equal those of a single process.

Shapes: B rows, T tokens, D model width, N tokens, L layers, E experts.

    torchrun --nproc-per-node 2 -- train.py --parallel pp=2 --run runs/two        # 1F1B; after python tokenizer.py --run runs/two
    torchrun --nproc-per-node 2 -- train.py --config small --parallel pp=2,vpp=2 --run runs/small  # interleaved
"""

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from cli import InputError
from compass import Compass, Losses, rope_table


class _Inject(torch.autograd.Function):
    """x_BTD unchanged; its backward also starts the backward of a loss, with gradient 1."""

    @staticmethod
    def forward(ctx, x_BTD, loss):
        return x_BTD.view_as(x_BTD)

    @staticmethod
    def backward(ctx, grad_BTD):
        return grad_BTD, torch.ones((), dtype=torch.float32, device=grad_BTD.device)


class Stage(Compass):
    """Some layers of a Compass; parameters keep the names they have in the whole."""

    def __init__(self, config, layers, first, last):
        super().__init__(config)
        self.blocks = nn.ModuleDict({str(i): self.blocks[i] for i in layers})
        self.first, self.last = first, last
        if not first:
            self.embedding = None
        if not last:
            self.norm, self.head, self.mtp = None, None, nn.ModuleList()

    def forward(self, x, *, targets_BT, weights_BT, doc_ids_BT, positions_BT):
        """tokens_BT (first stage), or the hidden state and MTP's embeddings side by side (B, T, D * (1 + depths)) -> the latter, or
        (last stage) this rank's share of the batch's loss."""
        rope = rope_table(self.ranks.part(positions_BT), self.config.head_dim, self.config.rope_base)
        mask, routing = self.ranks.mask(doc_ids_BT), []
        if self.first:
            x_BTD, later = self.embedding(self.ranks.part(x)), self._embed_later(x)
        else:
            x_BTD, *later = x.split(self.config.dim, -1)
        for block in self.blocks.values():
            x_BTD, routed = block(x_BTD, rope, mask)
            routing.append(routed)
        valid_BT = doc_ids_BT >= 0
        aux, z, load = self._router_losses(routing, self.ranks.part(valid_BT).reshape(-1))
        weights_BT = weights_BT * valid_BT
        own = weights_BT.sum()
        share = self.ranks.sum(own) / self.total  # of the micro-step in the batch
        aux, z = (loss * share * len(routing) / self.config.n_layers for loss in (aux, z))
        extra = self.router_scale * (self.config.aux_weight * aux + self.config.z_weight * z)
        load_LE = load.new_zeros(self.config.n_layers, self.config.n_experts)
        load_LE[[int(i) for i in self.blocks]] = load * (own / self.total)
        lm = mtp = extra.new_zeros(())
        if self.last:
            lm, nll_N = self._cross_entropy(x_BTD, targets_BT, weights_BT, weights_BT)
            self.nll.append(self.ranks.whole(nll_N.view(len(x_BTD), -1)))
            lm = lm * share
            mtp = self._mtp_loss(x_BTD, later, targets_BT, weights_BT, doc_ids_BT, rope, mask) * share
        loss = lm + extra + self.mtp_scale * self.config.mtp_weight * mtp
        for name, value in dict(total=loss, lm=lm, aux=aux, z=z, mtp=mtp, load_LE=load_LE).items():
            self.logged[name] = self.logged.get(name, 0.0) + value.detach()
        return loss if self.last else _Inject.apply(torch.cat((x_BTD, *later), -1), extra)


class Pipeline(nn.Module):
    """This rank's stages; `accumulate` runs a batch through the whole pipeline, forward and backward."""

    def __init__(self, config, ranks):
        super().__init__()
        self.config, self.ranks, self.router_scale, self.mtp_scale = config, ranks, 1.0, 1.0
        pp, self.count = ranks.layout.pp, ranks.layout.pp * ranks.layout.vpp
        runs = np.array_split(range(config.n_layers), self.count)
        self.indices = range(ranks.mesh.get_local_rank("pp"), self.count, pp)
        self.stages = nn.ModuleList(Stage(config, runs[i].tolist(), i == 0, i == self.count - 1) for i in self.indices)

    def named_parameters(self, *args, **kwargs):
        for stage in self.stages:
            yield from stage.named_parameters(*args, **kwargs)

    def schedule(self, rows, T, least, device):
        """torch's schedule for micro-batches of one shape, at least as many as stages and `least`; on every rank as many."""
        everywhere = torch.zeros(self.ranks.count, dtype=torch.int64, device=device)
        everywhere[self.ranks.index] = rows
        dist.all_reduce(everywhere, dist.ReduceOp.MAX)
        everywhere = everywhere.tolist()
        pp, interleaved = self.ranks.layout.pp, len(self.stages) > 1  # torch interleaves n micro-batches in n // pp equal rounds
        fits = (n for n in range(max(least, pp), rows + 1) if not any(r % n for r in everywhere) and not (interleaved and n % (n // pp)))
        count = next(fits, None)
        if count is None:
            raise InputError(
                f"the dp x ep ranks have {everywhere} rows a step, which do not make {max(least, pp)} or more "
                "micro-batches of one shape, as many on each: take rows that the ranks and stages divide"
            )
        B, dtype = rows // count, torch.bfloat16 if device.type == "cuda" else torch.float32  # of what travels
        width = self.config.dim * (1 + (self.config.mtp_depth if self.mtp_scale else 0))
        h_BTD = torch.empty(B, T // self.ranks.layout.cp, width, device="meta", dtype=dtype, requires_grad=True)
        tokens, loss = torch.empty(B, T, dtype=torch.int64, device="meta"), torch.empty((), device="meta", requires_grad=True)
        stages = [
            PipelineStage(stage, i, self.count, device, input_args=tokens if stage.first else h_BTD,
                          output_args=loss if stage.last else h_BTD, group=self.ranks.mesh["pp"].get_group())
            for i, stage in zip(self.indices, self.stages, strict=True)
        ]  # fmt: skip
        kind, work = (ScheduleInterleaved1F1B, stages) if interleaved else (Schedule1F1B, stages[0])
        return kind(work, count, lambda loss, _: loss, scale_grads=False)

    def loss(self, *_, **__):
        """Compass.loss of the batch that `accumulate` just ran, for loss functions that ask the model."""
        return self.losses

    def accumulate(self, micro_batches, total, loss_fn, device):
        """Gradients of this rank's micro-batches; returns (loss, {metric: tensor}), still to be summed over the data ranks.

        The stages train on Compass.loss; loss_fn only says what is logged.
        """
        for stage in self.stages:  # total: weight of the whole batch; logged: sums of this rank's losses; nll: nll_BT by micro-batch
            stage.total, stage.router_scale, stage.mtp_scale, stage.logged, stage.nll = total, self.router_scale, self.mtp_scale, {}, []
            for idle in () if self.mtp_scale else stage.mtp:  # torch's stages end the backward of every FSDP module, used or not
                idle.block.unshard()
        batch = {name: torch.cat([b[name] for b in micro_batches]).to(device) for name in micro_batches[0]}
        inputs = (batch["tokens"],) if self.stages[0].first else ()
        given = {f"{name}_BT": batch[name] for name in ("targets", "weights", "doc_ids", "positions")}
        schedule = self.schedule(*batch["tokens"].shape, len(micro_batches), device)
        schedule.step(*inputs, target=batch["targets"], return_outputs=False, **given)
        share = max(batch["weights"].sum().item(), 1e-9) / total  # of this rank in the batch
        sums = {name: sum(stage.logged[name] for stage in self.stages) / share for name in self.stages[0].logged}
        last = self.stages[-1]
        sums["nll_BT"] = torch.cat(last.nll) if last.last else torch.zeros_like(batch["weights"])
        for value in sums.values():
            dist.all_reduce(value, group=self.ranks.mesh["pp"].get_group())
        self.losses = Losses(**sums)
        loss, metrics = loss_fn(self, batch)
        return loss * share, {name: value * share for name, value in metrics.items()}
