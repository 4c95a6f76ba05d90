"""DPO: preferences trained into the model by a classification loss, offline on pairs or online on its own samples (v2 §4.2).

Training makes the better of two answers more probable and the worse one less, measured against a frozen copy of the model, the reference.
Offline, pairs come from a file. Online, each round samples n answers a prompt from the current model, labels them with a reward, and keeps
the best and the worst: by reward for general prompts, best right against best wrong for prompts with a checkable answer.

Shapes: B pairs, T tokens, V vocabulary. A batch holds 2B rows, the chosen answers first; mask is 1 on the answers' tokens.

    python dpo.py                                     # laptop: tunes runs/demo on the embedded pairs
    python dpo.py --rounds 3                          # online, labelled by the run's reward model (python reward.py)
    python dpo.py --data pairs.jsonl --run runs/small --device cuda
"""

import math
from collections import Counter
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import cli
from checkpoint import checkpoints, inherit, load_latest, load_model, load_weights
from cli import InputError
from data.scorers import SCORERS
from data.tasks import tasks
from generate import Sampling, generate, split_thought
from reward import Pairs, load_pairs, load_reward_model, processes_with_whole_rows, rewards
from sft import WITHOUT_THOUGHTS, chat_of
from train import Schedule, fit_stage, for_width, model_from, precision, stage_schedule

SCHEDULE = Schedule(200, 1e-5, 0.0, 20)  # a model of 30B takes 4e-7, near the OTPO paper's 5e-7
ROUND = Schedule(60, 3e-5, 0.0, 6)  # of each online round
BETA = 0.1
PROMPTS, SAMPLES = 2, 32  # online: prompts of each task and language in a round, answers to each
EXPLORING = Sampling(temperature=1.0, top_k=0, top_p=1.0, repetition=1.0, max_tokens=96)
OPEN = ("covers",)  # scorers of tasks with many right answers: reward alone decides; all others are checked by rule
DRIFT, KL = -1.0, 1.0  # nats a token; beyond these tuning has gone wrong


def token_logprobs(model, tokens_BT, mask_BT, *, doc_ids_BT=None, return_hidden=False, rows=512):
    """log p(token t | tokens before t) where mask_BT is 1, else 0: logp_BT in fp32.

    The head works on `rows` masked positions at a time and is recomputed in the backward pass, so that logits of a whole batch never
    exist. return_hidden adds the states after the final norm that predict the tokens, hidden_BTD aligned with the mask:
    hidden[:, t] is the state at t - 1.
    """
    h_BTD = model.norm(model.hidden(tokens_BT, doc_ids_BT=doc_ids_BT)[0])
    predicting_BTD = F.pad(h_BTD[:, :-1], (0, 0, 1, 0))  # position 0 has no state that predicts it
    use_BT = mask_BT > 0
    use_BT[:, 0] = False

    def logp(h_ND, token_N):
        return model.head(h_ND).float().log_softmax(-1).gather(1, token_N.unsqueeze(1)).squeeze(1)

    h_ND, token_N = predicting_BTD[use_BT], tokens_BT[use_BT]
    parts = [checkpoint(logp, h, token, use_reentrant=False) for h, token in zip(h_ND.split(rows), token_N.split(rows), strict=True)]
    logp_BT = torch.zeros_like(mask_BT, dtype=torch.float32).masked_scatter(use_BT, torch.cat(parts))
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
    right = [i for i in order if correct is None or correct[i]]
    wrong = order[::-1] if correct is None else [i for i in order if not correct[i]]
    if not right or not wrong:
        return None
    best, worst = right[0], wrong[0]
    if answers[best] == answers[worst] or (correct is None and rewards[best] == rewards[worst]):
        return None
    return answers[best], answers[worst]


@torch.no_grad()
def add_reference(pairs, model, rows=32):
    """Give every pair its answers' log-probabilities under the reference, computed once."""
    ranks, device, N = model.ranks, next(model.parameters()).device, len(pairs.rows)
    rows, reference = min(rows, N) * ranks.count, [None] * N
    for start in tqdm(range(0, N, rows), desc="reference", unit="batch", leave=False, disable=not ranks.writes):
        chosen = [i % N for i in range(start, start + rows)]  # the last batch begins again: every rank has as much to do
        batch = pairs.assemble(chosen)
        batch["place"] = torch.arange(len(batch["tokens"]))
        mine = {name: tensor.to(device) for name, tensor in ranks.take(batch).items()}
        with precision(model, device):  # as in training, or the start is off
            own_BT = token_logprobs(model, mine["tokens"], mine["mask"], doc_ids_BT=mine["doc_ids"])
        logp_BT = ranks.sum(own_BT.new_zeros(batch["mask"].shape).index_copy(0, mine["place"], own_BT)).cpu()
        for i, *logps in zip(chosen, *logp_BT.chunk(2), strict=True):
            reference[i] = [logp_T[: len(ids)] for logp_T, (ids, _) in zip(logps, pairs.rows[i], strict=True)]
    pairs.reference = reference


def preference_metrics(logp_BT, batch, chosen_B, rejected_B):
    """What to watch: rewards, margin, accuracy, the chosen answers' drift and the distance from the reference, both in nats a token.

    kl is the KL's second-order term on the pairs' own tokens. Estimators for sampled tokens would explode on rejected answers, which
    are to become unlikely.
    """
    mask_BT, gain_BT = batch["mask"], (logp_BT - batch["reference"]).detach()
    return {
        "rewards_chosen": chosen_B.mean(), "rewards_rejected": rejected_B.mean(), "margin": (chosen_B - rejected_B).mean(),
        "accuracy": (chosen_B > rejected_B).float().mean(), "logp_chosen": logp_BT.chunk(2)[0].sum(1).mean().detach(),
        "chosen_drift": (gain_BT.sum(1) / mask_BT.sum(1)).chunk(2)[0].mean(),
        "kl": (gain_BT.square().sum(1) / (2 * mask_BT.sum(1))).mean(),
    }  # fmt: skip


def dpo_objective(beta):
    """The loss function for `fit`."""

    def loss_fn(model, batch):
        logp_BT = token_logprobs(model, batch["tokens"], batch["mask"], doc_ids_BT=batch["doc_ids"])
        policy, reference = (x_BT.sum(1).chunk(2) for x_BT in (logp_BT, batch["reference"]))  # both 0 outside the answers
        loss, chosen_B, rejected_B = dpo_loss(*policy, *reference, beta)
        return loss, preference_metrics(logp_BT, batch, chosen_B, rejected_B)

    return loss_fn


def alarm(metrics):
    """What to say when tuning goes wrong: probability flows away from the chosen answers too, or the policy leaves the reference."""
    if metrics["chosen_drift"] < DRIFT:
        return f"the chosen answers have lost {-metrics['chosen_drift']:.1f} nats a token: lower the rate or raise beta"
    if metrics["kl"] > KL:
        return f"the KL from the reference is about {metrics['kl']:.1f} nats a token: lower the rate or raise beta"
    return None


def sample_answers(model, tokenizer, examples, n, seed):
    """n answers to each task from one shared prompt cache, thinking where the task has a thought: (prompts, Completions prompt-major)."""
    prompts = [tokenizer.encode_chat(task["messages"], thinking="think" in task)[0] for task in examples]
    return prompts, generate(model, tokenizer, prompts, replace(EXPLORING, seed=seed), n)


def label(tokenizer, examples, prompts, completions, judge, off_policy=False):
    """Pairs out of sampled answers (v2 §4.2): rows as `reward.encode_pairs` makes them, and a Counter of what was left out.

    judge(task, answers) -> rewards of the answers' texts, without thoughts. Which two make a pair is `select_pair`'s rule. Answers that
    never ended are left out. off_policy takes the task's own answer as the chosen one (v3's mixed-policy data): then only
    the rejected one is sampled, the best of the wrong ones, also where all are wrong.
    """
    n, end, rows, left_out = len(completions) // len(examples), tokenizer.special["<|end|>"], [], Counter()
    for i, (task, prompt) in enumerate(zip(examples, prompts, strict=True)):
        ended = [made for made in completions[i * n : (i + 1) * n] if made.stopped and split_thought(made.text)[1]]
        left_out["unfinished or empty answers"] += n - len(ended)
        texts = [split_thought(completion.text)[1] for completion in ended]
        by_reward = task["scorer"] in OPEN and not off_policy
        right = None if by_reward else [SCORERS[task["scorer"]](text, task["answer"]) for text in texts]
        pair = None
        if ended:
            answers, scores = [tuple(completion.ids) for completion in ended], judge(task, texts)
            if off_policy:  # above all others, and right
                ids, _ = tokenizer.encode_chat(chat_of(task, "think" in task), thinking="think" in task)
                answers, scores, right = [tuple(ids[len(prompt) : -1]), *answers], [math.inf, *scores], [True, *right]
            pair = select_pair(answers, scores, right)
        if pair is None:
            same = "right" if right and all(right) else "wrong" if right and not any(right) else "alike"
            left_out[f"prompts with all answers {same if ended else 'unfinished'}"] += 1
            continue
        rows.append([([*prompt, *ids, end], [0] * len(prompt) + [1] * (len(ids) + 1)) for ids in pair])
    return rows, left_out


def reward_judge(model, tokenizer):
    """The judge of `label` that asks a reward model."""

    def judge(task, answers):
        distinct = sorted(set(answers))
        found = rewards(model, tokenizer, [[*task["messages"], {"role": "assistant", "content": answer}] for answer in distinct])
        score = dict(zip(distinct, found, strict=True))
        return [score[answer] for answer in answers]

    return judge


def online(stage, objective, args, off_policy=False, schedule=ROUND):
    """args.rounds rounds of sampling, labelling and training, always against the run's last sft stage as the reference."""
    device, ranks, tokenizer, state = processes_with_whole_rows(args)
    if ranks is not None:
        raise InputError("--rounds samples in one process: under torchrun train on pairs (--data, or the embedded ones)")
    if args.data:
        raise InputError(f"--data {args.data} with --rounds: rounds make their pairs from the run's own answers; leave one of the two out")
    names = [*(f"{stage}/{turn}" for turn in range(1, args.rounds)), stage]
    if checkpoints(args.run, stage) and not all(checkpoints(args.run, name) for name in names):
        raise InputError(f"{args.run}/{stage} was begun with fewer rounds than {args.rounds}: give as many, or another --run")
    if stage_schedule(stage, args, schedule, state["origin"]) is None:  # the last round bears the stage's name
        return
    reference, model = load_model(state, device).eval(), load_model(state, device)
    judge_model, judge_state = load_reward_model(args.run, device)
    inherit(judge_state, tokenizer)
    judge = reward_judge(judge_model, tokenizer)
    for turn, name in enumerate(names, 1):
        planned = stage_schedule(name, args, schedule, state["origin"])
        if planned is None:
            load_weights(model, load_latest(args.run, name, device))
            continue
        examples = tasks("train", f"{stage}-{args.seed}-{turn}", PROMPTS)
        if state["stage"] in WITHOUT_THOUGHTS:
            examples = [{key: value for key, value in task.items() if key != "think"} for task in examples]
        prompts, completions = sample_answers(model, tokenizer, examples, SAMPLES, args.seed + turn)
        pairs = Pairs(*label(tokenizer, examples, prompts, completions, judge, off_policy), model.config.max_seq_len, args.seed)
        add_reference(pairs, reference)
        fit_stage(model, pairs.batch, objective, for_width(planned, model.config), name, args, tokenizer, alarm)


def tune(stage, objective, args, off_policy=False):
    """Train one preference stage from the run's last sft stage: on pairs, or with --rounds on the run's own answers (`online`)."""
    if not 0 < args.beta < math.inf:
        raise InputError(f"--beta is {args.beta}, must be over 0 and finite: without the pull there is no reference")
    if checkpoints(args.run, f"{stage}/{max(1, args.rounds)}"):
        raise InputError(f"{args.run}/{stage} was begun with more rounds than {args.rounds}: give as many, or another --run")
    if args.rounds > 0:
        return online(stage, objective, args, off_policy)
    device, ranks, tokenizer, state = processes_with_whole_rows(args)
    schedule = stage_schedule(stage, args, SCHEDULE, state["origin"])
    if schedule is not None:
        model = model_from(state, ranks, device)
        pairs = load_pairs(args.data, tokenizer, model.config.max_seq_len, args.seed, ranks)
        add_reference(pairs, model)
        fit_stage(model, pairs.batch, objective, for_width(schedule, model.config), stage, args, tokenizer, alarm)


def main():
    args = cli.parse(
        __doc__, "data", "run", "steps", "resume", "device", "seed", "parallel",
        data=dict(help="pairs .jsonl: {messages, chosen, rejected} (default: the embedded pairs)"),
        beta=dict(type=float, default=BETA, help="strength of the pull towards the reference"),
        rounds=dict(type=int, default=0, help="rounds of sampling and training on the run's own answers (0: offline, on pairs)"),
    )  # fmt: skip
    tune("dpo", dpo_objective(args.beta), args)


if __name__ == "__main__":
    cli.run(main)
