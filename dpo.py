"""DPO: preferences trained into the model by a classification loss, offline on pairs or online on its own samples (v2 §4.2).

Of two answers to a prompt the better one shall gain probability against a frozen reference, the worse one lose it. Offline,
pairs come from a file. Online, each round samples n answers a prompt from the current model, labels them with a reward, and keeps the
best and the worst: by reward for general prompts, best right against best wrong for prompts with a checkable answer.

Shapes: B pairs, T tokens, V vocabulary. A batch holds 2B rows, the chosen answers first; mask is 1 on the answers' tokens.

    python dpo.py                                     # laptop: tunes runs/demo on the embedded pairs
    python dpo.py --data pairs.jsonl --run runs/small --device cuda
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import cli
from checkpoint import inherit, latest_stage, load_latest, load_model
from reward import load_pairs
from tokenizer import Tokenizer
from train import Schedule, fit, stage_schedule

SCHEDULE = Schedule(200, 1e-5, 0.0, 20)  # a model of 30B takes 5e-7
BETA = 0.1


def token_logprobs(model, tokens_BT, mask_BT, *, doc_ids_BT=None, return_hidden=False, rows=512):
    """log p(token t | tokens before t) where mask_BT is 1, else 0: logp_BT in fp32.

    The head works on `rows` masked positions at a time and is recomputed in the backward pass, so that logits of a whole batch never
    exist. return_hidden adds the states after the final norm that predict the tokens, hidden_BTD aligned with the mask:
    hidden[:, t] is the state at t - 1.
    """
    h_BTD = model.norm(model.hidden(tokens_BT, doc_ids_BT=doc_ids_BT)[0])
    predicting_BTD = F.pad(h_BTD[:, :-1], (0, 0, 1, 0))  # position 0 has no state that predicts it
    use_BT = mask_BT.bool()
    use_BT[:, 0] = False

    def logp(h_ND, token_N):
        return model.head(h_ND).float().log_softmax(-1).gather(1, token_N.unsqueeze(1)).squeeze(1)

    h_ND, token_N = predicting_BTD[use_BT], tokens_BT[use_BT]
    parts = [checkpoint(logp, h, token, use_reentrant=False) for h, token in zip(h_ND.split(rows), token_N.split(rows), strict=True)]
    logp_BT = torch.zeros(mask_BT.shape, dtype=torch.float32, device=tokens_BT.device)
    logp_BT = logp_BT.masked_scatter(use_BT, torch.cat(parts))
    return (logp_BT, predicting_BTD) if return_hidden else logp_BT


def dpo_loss(policy_chosen_B, policy_rejected_B, ref_chosen_B, ref_rejected_B, beta):
    """-log σ(β [(log π(y_w) - log π_ref(y_w)) - (log π(y_l) - log π_ref(y_l))]) (v2 §4.2), log-probabilities summed over the answers.

    Returns (mean loss, chosen_rewards_B, rejected_rewards_B), rewards β (log π - log π_ref) detached.
    """
    chosen_B = beta * (policy_chosen_B - ref_chosen_B)
    rejected_B = beta * (policy_rejected_B - ref_rejected_B)
    return -F.logsigmoid(chosen_B - rejected_B).mean(), chosen_B.detach(), rejected_B.detach()


def select_pair(answers, rewards, correct=None):
    """(chosen, rejected) of the sampled answers of one prompt, or None where they teach nothing (v2 §4.2).

    General prompts (correct is None): highest against lowest reward. Prompts with a checkable answer: the highest reward among the
    right ones against the highest among the wrong ones; none where all are right or all wrong. Two equal texts are no pair.
    """
    order = sorted(range(len(answers)), key=lambda i: -rewards[i])
    if correct is None:
        best, worst = order[0], order[-1]
    else:
        right, wrong = ([i for i in order if bool(correct[i]) == side] for side in (True, False))
        if not right or not wrong:
            return None
        best, worst = right[0], wrong[0]
    if answers[best] == answers[worst] or (correct is None and rewards[best] == rewards[worst]):
        return None
    return answers[best], answers[worst]


@torch.no_grad()
def add_reference(pairs, model, rows=32):
    """Give every pair its answers' log-probabilities under the reference, computed once."""
    reference, device = [], next(model.parameters()).device
    for start in tqdm(range(0, len(pairs.rows), rows), desc="reference", unit="batch", leave=False):
        chosen = range(start, min(len(pairs.rows), start + rows))
        batch = {name: tensor.to(device) for name, tensor in pairs.assemble(chosen).items()}
        logp = token_logprobs(model, batch["tokens"], batch["mask"], doc_ids_BT=batch["doc_ids"]).cpu()
        for i, chosen_T, rejected_T in zip(chosen, *logp.chunk(2), strict=True):
            reference.append([row_T[: len(ids)] for row_T, (ids, _) in zip((chosen_T, rejected_T), pairs.rows[i], strict=True)])
    pairs.reference = reference


def preference_metrics(logp_BT, batch, chosen_B, rejected_B):
    """What to watch: rewards, margin, accuracy, the chosen answers' drift in nats a token, and an estimate of the KL from the reference."""
    mask_BT, gain_BT = batch["mask"], (logp_BT - batch["reference"]).detach()
    chosen_mask = mask_BT.chunk(2)[0]
    return {
        "rewards_chosen": chosen_B.mean(), "rewards_rejected": rejected_B.mean(), "margin": (chosen_B - rejected_B).mean(),
        "accuracy": (chosen_B > rejected_B).float().mean(), "logp_chosen": (logp_BT.chunk(2)[0].sum(1)).mean().detach(),
        "chosen_drift": (gain_BT.chunk(2)[0] * chosen_mask).sum() / chosen_mask.sum(),
        "kl": ((-gain_BT).exp() - 1 + gain_BT).mul(mask_BT).sum() / mask_BT.sum(),
    }  # fmt: skip


def dpo_objective(beta):
    """The loss function for `fit`."""

    def loss_fn(model, batch):
        logp_BT = token_logprobs(model, batch["tokens"], batch["mask"], doc_ids_BT=batch["doc_ids"])
        policy, reference = ((x * batch["mask"]).sum(1).chunk(2) for x in (logp_BT, batch["reference"]))
        loss, chosen_B, rejected_B = dpo_loss(*policy, *reference, beta)
        return loss, preference_metrics(logp_BT, batch, chosen_B, rejected_B)

    return loss_fn


def tune(stage, objective, args, schedule=SCHEDULE):
    """Train one preference stage from the run's last sft stage."""
    device, tokenizer = cli.pick_device(args.device), Tokenizer.load(args.run)
    torch.manual_seed(args.seed)
    state = load_latest(args.run, latest_stage(args.run, among=("sft1", "sft2")), device)
    inherit(state, tokenizer)
    schedule = stage_schedule(stage, args, schedule)
    if schedule is None:
        return
    model = load_model(state, device)
    pairs = load_pairs(args.data, tokenizer, model.config.max_seq_len, args.seed)
    add_reference(pairs, model)
    fit(
        model, pairs.batch, objective, schedule, run=args.run, stage=stage, tokenizer_hash=tokenizer.hash, seed=args.seed,
        resume=args.resume,
    )  # fmt: skip


def main():
    args = cli.parse(
        __doc__, "data", "run", "steps", "resume", "device", "seed",
        data=dict(help="pairs .jsonl: {messages, chosen, rejected} (default: the embedded pairs)"),
        beta=dict(type=float, default=BETA, help="strength of the pull towards the reference"),
    )  # fmt: skip
    tune("dpo", dpo_objective(args.beta), args)


if __name__ == "__main__":
    cli.run(main)
