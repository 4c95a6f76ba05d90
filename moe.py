"""Mixture of experts (v2 §2.2): shared experts that see every token, routed experts that see their own.

A router scores all experts for each token; the best K of E work on it, weighted by their renormalised probabilities, beside the shared
experts that always do. Two small losses keep the router healthy: the aux loss spreads tokens over experts, the z-loss keeps the router's
logits small. No token is ever dropped.

Shapes: N tokens, D model width, E experts, K experts per token, R = N*K, F expert width, P threads.

    python moe.py       # one layer on random tokens: shapes, losses, load per expert
"""

import torch
import torch.nn.functional as F
from torch import nn

import cli
from kernels import count_assignments, permute, unpermute

FEW = 32  # up to so many rows, a matrix product takes about as long as reading the matrix
SMALL = 1 << 19  # up to so many weights, reading them all takes less time than the calls that would save it


def load_balancing_loss(probs_NE, expert_index_NK, num_experts, counts_E=None):
    """L_aux = E * sum_i (p_i / N) (c_i / (N K)) (v2 §2.2), a scalar.

    p_i is the routing probability of expert i (before top-k) summed over the N tokens, c_i the number of
    tokens assigned to it. 1 at perfect balance; E / K when all tokens are certain of the same K. counts_E: the c_i
    of a larger batch that these N tokens are part of (default: their own).
    """
    counts_E = count_assignments(expert_index_NK, num_experts) if counts_E is None else counts_E
    p_E, c_E = probs_NE.sum(0) / max(1, len(probs_NE)), counts_E.to(probs_NE.dtype)  # a rank may hold padding only
    return num_experts * (p_E * c_E / counts_E.sum().clamp_min(1)).sum()


def router_z_loss(logits_NE):
    """L_z = mean_n (logsumexp_i z_ni)^2 (v2 §2.2), a scalar."""
    return logits_NE.logsumexp(-1).square().sum() / max(1, len(logits_NE))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one matrix."""

    def __init__(self, dim, width):
        super().__init__()
        self.gate_up = Linear(dim, 2 * width)
        self.down = Linear(width, dim)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Router(nn.Linear):
    """x_ND -> logits_NE in at least fp32, whatever the autocast: bf16 flips near ties."""

    def forward(self, x_ND):
        with torch.autocast(x_ND.device.type, enabled=False):
            wide = torch.promote_types(x_ND.dtype, torch.float32)
            return F.linear(x_ND.to(wide), self.weight.to(wide))


class MoE(nn.Module):
    """n_experts routed SwiGLU experts, top_k of them per token, plus one SwiGLU of n_shared * expert_dim.

    forward: x_BTD -> (y_BTD, logits_NE, index_NK) with N = B*T; logits are fp32, before the softmax. The experts' weights are empty
    until compass.init_weights fills them.
    """

    whole = True  # False where this rank holds a part of the experts

    def __init__(self, config):
        super().__init__()
        self.top_k, self.n_experts = config.top_k, config.n_experts
        E, D, width = config.n_experts, config.dim, config.expert_dim
        self.router = Router(D, E, bias=False)
        self.gate_up_ED2F = nn.Parameter(torch.empty(E, D, 2 * width))
        self.down_EFD = nn.Parameter(torch.empty(E, width, D))
        self.shared = SwiGLU(D, config.n_shared * width) if config.n_shared else None

    def route(self, x_ND):
        """Return (logits_NE, weights_NK, index_NK); logits and weights are fp32."""
        logits_NE = self.router(x_ND)
        probs_NK, index_NK = logits_NE.softmax(-1).topk(self.top_k, dim=-1)
        if self.top_k > 1:  # renormalising a single probability would make it 1 and starve the router of gradient
            probs_NK = probs_NK / probs_NK.sum(-1, keepdim=True)
        return logits_NE, probs_NK, index_NK

    def experts(self, x_RD, counts_E):
        return grouped_swiglu(x_RD, counts_E, self.gate_up_ED2F, self.down_EFD)

    def every_expert(self, x_ND, weights_NK, index_NK):
        """What permute, `experts` and unpermute give, by asking all experts about all tokens and weighing most answers with 0 (an expert
        that is not finite so spoils all tokens, not its own alone)."""
        gate_ENF, up_ENF = (x_ND @ self.gate_up_ED2F).chunk(2, dim=-1)
        weights_NE = torch.zeros(len(x_ND), self.n_experts, dtype=weights_NK.dtype, device=x_ND.device).scatter_(1, index_NK, weights_NK)
        h_ENF = F.silu(gate_ENF) * up_ENF * weights_NE.T.unsqueeze(-1)
        return (h_ENF.to(self.down_EFD.dtype) @ self.down_EFD).sum(0).to(x_ND.dtype)

    def one_token(self, x_1D, weights_1K, index_1K):
        """What permute, `experts` and unpermute give for a single token, without sorting."""
        chosen = index_1K[0].tolist()
        gate_KF, up_KF = torch.cat([times_matrix(x_1D, self.gate_up_ED2F[e]) for e in chosen]).chunk(2, dim=-1)
        h_KF = F.silu(gate_KF) * up_KF * weights_1K.T.to(up_KF.dtype)
        return sum(times_matrix(h_1F, self.down_EFD[e]) for h_1F, e in zip(h_KF.split(1), chosen, strict=True))

    def all_are_read(self, N):
        """Whether `every_expert` pays: it reads all weights, so these should be few or the N tokens choose about all experts anyway, and
        tokens so few that a product takes no longer than reading its weights. Not in training."""
        cheap = N * self.top_k >= self.n_experts or self.gate_up_ED2F.numel() + self.down_EFD.numel() <= SMALL
        return cheap and self.whole and N <= FEW and not torch.is_grad_enabled()

    def forward(self, x_BTD):
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        logits_NE, weights_NK, index_NK = self.route(x_ND)
        if self.all_are_read(len(x_ND)):
            y_ND = self.every_expert(x_ND, weights_NK, index_NK)
        elif len(x_ND) == 1 and self.whole and few_on_cpu(x_ND):
            y_ND = self.one_token(x_ND, weights_NK, index_NK)
        else:
            x_RD, row_of_NK, counts_E = permute(x_ND, index_NK, self.n_experts)
            y_ND = unpermute(self.experts(x_RD, counts_E), row_of_NK, weights_NK)
        if self.shared is not None:
            y_ND = y_ND + self.shared(x_ND)
        return y_ND.view_as(x_BTD), logits_NE, index_NK


def grouped_swiglu(x_RD, counts_E, gate_up_ED2F, down_EFD):
    """Each expert's SwiGLU on its contiguous slice of rows, as two grouped matrix products, in the autocast dtype where one is set."""
    device, ends_E = x_RD.device.type, counts_E.cumsum(0).to(torch.int32)
    if torch.is_autocast_enabled(device):
        x_RD, gate_up_ED2F, down_EFD = (t.to(torch.get_autocast_dtype(device)) for t in (x_RD, gate_up_ED2F, down_EFD))
    gate_RF, up_RF = F.grouped_mm(x_RD, gate_up_ED2F, offs=ends_E).chunk(2, dim=-1)
    return F.grouped_mm(F.silu(gate_RF) * up_RF, down_EFD, offs=ends_E)


# A CPU's BLAS may leave a product of few rows to one thread, half the rate at which memory could bring the matrix. As a batch of
# products, each for a part of the outputs, it is shared among all of them.


def few_on_cpu(x):
    """Whether x is a plain tensor of so few rows, outside training, on a CPU."""
    return type(x) is torch.Tensor and x.device.type == "cpu" and not torch.is_grad_enabled() and x.numel() <= FEW * x.shape[-1]


class Linear(nn.Linear):
    """nn.Linear without bias; the outputs of a large one are divided among the threads where rows are few."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x):
        P = torch.get_num_threads()
        if P == 1 or self.out_features % P or self.weight.numel() <= SMALL or not few_on_cpu(x):
            return super().forward(x)
        x_DN = x.reshape(-1, x.shape[-1]).T
        y_PFN = torch.bmm(self.weight.view(P, -1, self.in_features), x_DN.expand(P, -1, -1))
        return y_PFN.flatten(0, 1).T.contiguous().view(*x.shape[:-1], self.out_features)


def times_matrix(x_1D, weight_DF):
    """x @ weight, divided likewise."""
    P = torch.get_num_threads()
    if P == 1 or weight_DF.shape[1] % P:
        return x_1D @ weight_DF
    return torch.bmm(x_1D.expand(P, -1, -1), weight_DF.unflatten(1, (P, -1)).transpose(0, 1)).view(1, -1)


def main():
    from compass import CONFIGS, init_weights

    cli.parse(__doc__)
    config = CONFIGS["tiny"]
    torch.manual_seed(0)
    layer = MoE(config)
    init_weights(layer, config)
    x_BTD = torch.randn(4, 256, config.dim)
    y_BTD, logits_NE, index_NK = layer(x_BTD)
    print(f"x {tuple(x_BTD.shape)} -> y {tuple(y_BTD.shape)}, {config.n_experts} experts, top-{config.top_k}")
    aux = load_balancing_loss(logits_NE.softmax(-1), index_NK, config.n_experts)
    print(f"aux loss {aux.item():.3f} (1 is perfect balance), z-loss {router_z_loss(logits_NE).item():.3f}")
    print("tokens per expert:", torch.bincount(index_NK.flatten(), minlength=config.n_experts).tolist())


if __name__ == "__main__":
    cli.run(main)
