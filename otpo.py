"""OTPO: optimal-transport token weights inside the DPO loss (v3 §4; arXiv 2505.18720).

DPO sums the log-probabilities of all answer tokens, so a long answer weighs more than a short one and tokens that carry
the preference count no more than the others. OTPO transports the tokens of the chosen answer to those of the rejected one, at a cost that
is the distance of their hidden states, and lets every token weigh what the plan moves through it. Both answers
then weigh min(|y_c|, |y_r|) in all, so length no longer pays. Transport gives tokens that find a partner in
the other answer more mass than tokens that do not: look at the picture before believing what a token's weight means.

Shapes: B pairs, T chosen tokens, S rejected tokens, D model width. Masks are 1 on answer tokens.

    python otpo.py                                     # laptop: tunes runs/demo on the embedded pairs
    python otpo.py --rounds 1                          # mixed policy: reference answers against the model's own wrong ones
    python otpo.py --data pairs.jsonl --run runs/small --device cuda
"""

import math

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import cli
from cli import InputError
from dpo import BETA, preference_metrics, token_logprobs, tune


def contraction(reg, reg_marginal):
    """f = reg_marginal / (reg_marginal + reg); a sweep shrinks the error of the potentials by f². Raises InputError below reg 0.05 and
    where reg_marginal is not above 0 and at most 100 reg, which takes 926 sweeps."""
    if not 0.05 <= reg < math.inf:
        raise InputError(f"reg is {reg}; below 0.05 the sweeps do not converge in fp32")
    if not 0 < reg_marginal <= 100 * reg:
        raise InputError(f"reg_marginal is {reg_marginal}, must be above 0 and at most 100 times reg, {reg}")
    return reg_marginal / (reg_marginal + reg)


def sinkhorn(cost_BTS, mass_BT, mass_BS, reg, reg_marginal, sweeps):
    """Unbalanced entropic transport, one solve for the whole batch -> plan_BTS.

    argmin_G <G, M> + reg Σ (G log G - G) + reg_marginal [KL(G1 | a) + KL(G'1 | b)]   (arXiv 2505.18720)

    by alternating scaling in the log domain; a and b are the masses, 0 on padding.
    """
    f = contraction(reg, reg_marginal)
    log_kernel_BTS, log_a_BT, log_b_BS = -cost_BTS / reg, mass_BT.log(), mass_BS.log()
    lv_BS = torch.zeros_like(log_b_BS).masked_fill(mass_BS == 0, -torch.inf)
    for _ in range(sweeps):
        lu_BT = f * (log_a_BT - (log_kernel_BTS + lv_BS.unsqueeze(1)).logsumexp(2))
        lv_BS = f * (log_b_BS - (log_kernel_BTS + lu_BT.unsqueeze(2)).logsumexp(1))
    return (lu_BT.unsqueeze(2) + log_kernel_BTS + lv_BS.unsqueeze(1)).exp()


def sweeps_for(reg, reg_marginal, tolerance=1e-8):
    """Sweeps after which the error of the potentials has shrunk by `tolerance`: 6 at the defaults, 23 at reg 0.1."""
    return math.ceil(math.log(tolerance) / (2 * math.log(contraction(reg, reg_marginal))))


def transported_mass(cost_BTS, mass_BT, mass_BS, reg, reg_marginal):
    """(row sums, column sums) of `sinkhorn`'s plan, without the plan: (B, T), (B, S).

    The same sweeps as scalings u, v of K = exp(-M / reg), two batched matrix-vector products each. Needs costs of at most 1, so
    that with reg of at least 0.05 no entry of K is below e^-20; `sinkhorn` takes any.
    """
    f = contraction(reg, reg_marginal)
    kernel_BTS, a_BT1, b_B1S = (cost_BTS / -reg).exp_(), mass_BT.unsqueeze(2), mass_BS.unsqueeze(1)
    v_B1S = (b_B1S > 0).to(kernel_BTS.dtype)
    for _ in range(sweeps_for(reg, reg_marginal)):
        u_BT1 = (a_BT1 / (kernel_BTS @ v_B1S.mT)) ** f
        v_B1S = (b_B1S / (u_BT1.mT @ kernel_BTS)) ** f
    return (u_BT1 * (kernel_BTS @ v_B1S.mT)).squeeze(2), (v_B1S * (u_BT1.mT @ kernel_BTS)).squeeze(1)


def distances(x_BTD, y_BSD):
    """Euclidean distances (B, T, S). |x|² + |y|² - 2 x·y is one matrix product but cancels where states are nearly equal, as those of
    a common beginning are: these few are computed again from the difference."""
    lengths_BTS = x_BTD.square().sum(2).unsqueeze(2) + y_BSD.square().sum(2).unsqueeze(1)
    squared_BTS = torch.baddbmm(lengths_BTS, x_BTD, y_BSD.transpose(1, 2), alpha=-2)
    b, t, s = (squared_BTS < lengths_BTS.mul_(1e-3)).nonzero(as_tuple=True)
    squared_BTS[b, t, s] = (x_BTD[b, t] - y_BSD[b, s]).square().sum(1)
    return squared_BTS.sqrt_()


def answers_alone(mask_BT, x_BTx):
    """The rows of x (B, T, …) without what is no answer, padded with 0 to the longest answer: (B, A, …)."""
    return pad_sequence([x_Tx[mask_T > 0] for x_Tx, mask_T in zip(x_BTx, mask_BT, strict=True)], batch_first=True)


@torch.no_grad()
def ot_token_weights(hidden_chosen_BTD, hidden_rejected_BSD, mask_chosen_BT, mask_rejected_BS, reg=1.0, reg_marginal=0.2):
    """Weights of the answer tokens, (w_chosen_BT, w_rejected_BS), fp32 or wider, without gradient; 0 on padding.

    The cost is the Euclidean distance of the policy's states after the final norm, at the positions that predict the tokens, divided by its
    largest value in the pair where that exceeds 1. Each side's weights sum to min(|y_c|, |y_r|). Raises
    InputError naming a pair with an empty answer, and where reg is below 0.05.
    """
    wide = torch.promote_types(hidden_chosen_BTD.dtype, torch.float32)
    a_BT, b_BS = mask_chosen_BT.to(wide), mask_rejected_BS.to(wide)
    tau_B1 = torch.minimum(a_BT.sum(1), b_BS.sum(1)).unsqueeze(1)
    if not bool((tau_B1 > 0).all()):
        raise InputError(f"pair {int((tau_B1 == 0).nonzero()[0, 0])} has an empty answer")
    with torch.autocast(hidden_chosen_BTD.device.type, enabled=False):
        x_BAD, a_BA = (answers_alone(a_BT, x) for x in (hidden_chosen_BTD.to(wide), a_BT))  # prompts would only cost time and memory
        y_BCD, b_BC = (answers_alone(b_BS, y) for y in (hidden_rejected_BSD.to(wide), b_BS))
        cost_BAC = distances(x_BAD, y_BCD).mul_((a_BA > 0).unsqueeze(2)).mul_((b_BC > 0).unsqueeze(1))
        # in place: on a CPU fresh memory costs more than the sums
        cost_BAC.div_(cost_BAC.amax((1, 2), keepdim=True).clamp_min(1.0))
        chosen_BA, rejected_BC = transported_mass(cost_BAC, a_BA, b_BC, reg, reg_marginal)
        share_B1 = tau_B1 / chosen_BA.sum(1, keepdim=True)
    w_chosen_BA, w_rejected_BC = share_B1 * chosen_BA, share_B1 * rejected_BC
    return a_BT.masked_scatter(a_BT > 0, w_chosen_BA[a_BA > 0]), b_BS.masked_scatter(b_BS > 0, w_rejected_BC[b_BC > 0])


def uniform_weights(mask_chosen_BT, mask_rejected_BS):
    """The ablation without transport: every token of an answer weighs min(|y_c|, |y_r|) / its length."""
    a_BT, b_BS = mask_chosen_BT.float(), mask_rejected_BS.float()
    tau_B1 = torch.minimum(a_BT.sum(1), b_BS.sum(1)).unsqueeze(1)
    return a_BT * tau_B1 / a_BT.sum(1, keepdim=True), b_BS * tau_B1 / b_BS.sum(1, keepdim=True)


def otpo_loss(policy_chosen_BT, policy_rejected_BS, ref_chosen_BT, ref_rejected_BS, w_chosen_BT, w_rejected_BS, beta):
    """-log σ(β [Σ w_c q_c - Σ w_r q_r]), q the policy's minus the reference's log-probability of a token (arXiv 2505.18720).

    Returns (mean loss, chosen_rewards_B, rejected_rewards_B), rewards β Σ w q detached. All-ones weights (on the masks) give `dpo_loss`.
    """
    chosen_B = beta * ((policy_chosen_BT - ref_chosen_BT) * w_chosen_BT).sum(1)
    rejected_B = beta * ((policy_rejected_BS - ref_rejected_BS) * w_rejected_BS).sum(1)
    return -F.logsigmoid(chosen_B - rejected_B).mean(), chosen_B.detach(), rejected_B.detach()


def otpo_objective(beta, weights="transport"):
    """The loss function for `fit`. weights: "transport", or the ablations "uniform" and "ones" (which is DPO)."""

    def loss_fn(model, batch):
        logp_BT, hidden_BTD = token_logprobs(model, batch["tokens"], batch["mask"], doc_ids_BT=batch["doc_ids"], return_hidden=True)
        masks = batch["mask"].float().chunk(2)
        if weights == "transport":
            w_chosen, w_rejected = ot_token_weights(*hidden_BTD.chunk(2), *masks)
        else:
            w_chosen, w_rejected = uniform_weights(*masks) if weights == "uniform" else masks
        loss, chosen_B, rejected_B = otpo_loss(*logp_BT.chunk(2), *batch["reference"].chunk(2), w_chosen, w_rejected, beta)
        return loss, preference_metrics(logp_BT, batch, chosen_B, rejected_B)

    return loss_fn


def main():
    args = cli.parse(
        __doc__, "data", "run", "steps", "resume", "device", "seed", "parallel",
        data=dict(help="pairs .jsonl: {messages, chosen, rejected} (default: the embedded pairs)"),
        beta=dict(type=float, default=BETA, help="strength of the pull towards the reference"),
        weights=dict(default="transport", choices=("transport", "uniform", "ones"), help="token weights; the last two are ablations"),
        rounds=dict(type=int, default=0, help="rounds on mixed pairs: reference answers against own wrong ones (0: offline)"),
    )  # fmt: skip
    tune("otpo", otpo_objective(args.beta, args.weights), args, off_policy=True)


if __name__ == "__main__":
    cli.run(main)
