"""Generation: KV cache, ragged batches, the report's sampling, and a chat in the terminal (v2 §5.1 settings).

Prompts of different lengths are prefilled together, right-padded; every row then writes its own next
slot of the cache, and a query sees exactly the slots up to its own position, so padding is never
seen and is overwritten as the row grows. Each completion has its own random stream, made from the
seed, its prompt and its number: what a prompt gets does not depend on what else is in the batch.

Shapes: B rows, T tokens, G key/value heads, M cache slots, C head width, V vocabulary.

    python generate.py                                          # chat with runs/demo (/think switches thoughts)
    python generate.py --prompt "What is 27 + 45?" --think      # one answer
"""

import zlib
from dataclasses import dataclass

import torch

import cli
from checkpoint import inherit, latest_stage, load_latest, load_model
from cli import InputError
from lowbit import is_quantized, load_quantized
from tokenizer import Tokenizer


@dataclass
class Sampling:
    """The report's defaults. temperature 0 is greedy; top_k 0 and top_p 1 switch their filter off."""

    temperature: float = 0.4
    top_k: int = 5
    top_p: float = 0.85
    repetition: float = 1.05
    max_tokens: int = 2048
    seed: int = 42
    think_budget: int | None = None  # tokens of thought after which </think> is put


GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, repetition=1.0, max_tokens=96)


@dataclass
class Completion:
    """Generated text (thoughts included), its ids without the stop token, and each id's log-probability."""

    text: str
    ids: list
    logprobs: list
    stopped: bool  # False when max_tokens or the context ended it


class KVCache:
    """Keys and values of all layers, (L, B, G, M, C) each; row b's token at position p sits in slot p."""

    def __init__(self, config, rows, slots, device, dtype=torch.float32):
        shape = (config.n_layers, rows, config.n_kv_heads, slots, config.head_dim)
        self.k, self.v = torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype)

    def advance(self, positions_BT):
        """Set where the next tokens go; return the (B, 1, T, used slots) mask: each query sees slots up to its own."""
        self.positions_BT, self.used = positions_BT, int(positions_BT.max()) + 1
        slots = torch.arange(self.used, device=positions_BT.device)
        return (slots <= positions_BT.unsqueeze(-1)).unsqueeze(1)

    def update(self, layer, k_BGTC, v_BGTC):
        row_B1 = torch.arange(len(k_BGTC), device=k_BGTC.device).unsqueeze(1)
        self.k[layer][row_B1, :, self.positions_BT] = k_BGTC.transpose(1, 2).to(self.k.dtype)
        self.v[layer][row_B1, :, self.positions_BT] = v_BGTC.transpose(1, 2).to(self.v.dtype)
        return self.k[layer, :, :, : self.used], self.v[layer, :, :, : self.used]

    def select(self, rows):
        """Keep these rows, in this order; a row may be repeated (n samples share one prompt's cache)."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]


def filtered_probs(logits_BV, seen_BV, sampling):
    """Sampling distribution: repetition penalty, then temperature, then top-k, then top-p; (B, V) fp32.

    seen_BV marks tokens of the prompt and the answer so far; their positive logits are divided and their
    negative ones multiplied by the penalty. Greedy puts all mass on the largest logit.
    """
    logits_BV = logits_BV.float()
    if sampling.repetition != 1:
        penalised = torch.where(logits_BV > 0, logits_BV / sampling.repetition, logits_BV * sampling.repetition)
        logits_BV = torch.where(seen_BV, penalised, logits_BV)
    if sampling.temperature == 0:
        return torch.zeros_like(logits_BV).scatter_(1, logits_BV.argmax(1, keepdim=True), 1.0)
    probs_BV = (logits_BV / sampling.temperature).softmax(-1)
    if not sampling.top_k and sampling.top_p >= 1:  # nothing to filter, so nothing to sort
        return probs_BV
    V = probs_BV.shape[1]
    top_BK, index_BK = probs_BV.topk(min(sampling.top_k or V, V))
    top_BK = top_BK / top_BK.sum(-1, keepdim=True)
    # nucleus: the smallest set of top tokens whose mass reaches top_p, the one that crosses it included
    top_BK = top_BK * (top_BK.cumsum(-1) - top_BK < sampling.top_p)
    return torch.zeros_like(probs_BV).scatter_(1, index_BK, top_BK / top_BK.sum(-1, keepdim=True))


def _draw(probs_BV, generators):
    """One id per row by inverse transform, each row from its own generator."""
    u_B1 = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in generators]).to(probs_BV.device)
    cdf_BV = probs_BV.double().cumsum(-1)
    ids_B = torch.searchsorted(cdf_BV, u_B1 * cdf_BV[:, -1:], right=True).squeeze(1)
    return ids_B.clamp_max(probs_BV.shape[1] - 1)


@torch.inference_mode()
def generate(model, tokenizer, prompts, sampling, n=1, max_rows=64):
    """Complete each prompt n times; list of Completion, prompt-major.

    prompts: lists of token ids (`Tokenizer.encode_chat` makes them) or strings, encoded as ordinary text.
    A completion ends at <|end|> or <|endoftext|>, after sampling.max_tokens, or where the context
    ends. max_rows bounds the rows decoded together, and so the cache. Raises InputError on an empty
    prompt or one that leaves no room in the context.
    """
    ids = [tokenizer.encode(p) if isinstance(p, str) else list(p) for p in prompts]
    limit = model.config.max_seq_len
    for i, prompt in enumerate(ids):
        if not 0 < len(prompt) < limit:
            raise InputError(f"prompt {i} has {len(prompt)} tokens; the context holds 1 to {limit - 1} before an answer")
        if max(prompt) >= tokenizer.n_vocab or min(prompt) < 0:
            raise InputError(f"prompt {i} holds a token id outside the vocabulary 0..{tokenizer.n_vocab - 1}")
    if sampling.think_budget is not None and sampling.think_budget < 0:
        raise InputError(f"the thinking budget is {sampling.think_budget}, must be at least 0")
    if sampling.max_tokens < 1 or n < 1:
        raise InputError(f"max_tokens is {sampling.max_tokens} and n is {n}; both must be at least 1")
    was_training = model.training
    model.eval()
    completions = [None] * (len(ids) * n)
    order = sorted(range(len(completions)), key=lambda i: (len(ids[i // n]), i))  # like lengths decode together
    for start in range(0, len(order), max_rows):
        chosen = order[start : start + max_rows]
        requests = [(ids[i // n], i % n) for i in chosen]
        for i, completion in zip(chosen, _generate_rows(model, tokenizer, requests, sampling), strict=True):
            completions[i] = completion
    model.train(was_training)
    return completions


def _generate_rows(model, tokenizer, requests, sampling):
    """Decode one batch of (prompt ids, sample number) requests."""
    device, limit = next(model.parameters()).device, model.config.max_seq_len
    stops = {tokenizer.special["<|end|>"], tokenizer.special["<|endoftext|>"]}
    generators = []
    for prompt, sample in requests:
        key = f"{sampling.seed}-{zlib.crc32(str(prompt).encode())}-{sample}".encode()
        generators.append(torch.Generator().manual_seed(zlib.crc32(key)))

    distinct = {tuple(prompt): None for prompt, _ in requests}  # equal prompts are prefilled once
    for row, prompt in enumerate(distinct):
        distinct[prompt] = row
    width = max(map(len, distinct))
    tokens_BT = torch.zeros(len(distinct), width, dtype=torch.int64, device=device)
    for prompt, row in distinct.items():
        tokens_BT[row, : len(prompt)] = torch.tensor(prompt, device=device)
    cache = KVCache(model.config, len(distinct), min(limit, width + sampling.max_tokens), device)
    h_BTD, *_ = model.hidden(tokens_BT, cache=cache)
    length_B = torch.tensor([len(prompt) for prompt in distinct], device=device)
    h_BD = h_BTD[torch.arange(len(distinct), device=device), length_B - 1]

    rows = torch.tensor([distinct[tuple(prompt)] for prompt, _ in requests], device=device)
    cache.select(rows)
    length_B, logits_BV = length_B[rows], model.head(model.norm(h_BD))[rows]
    seen_BV = torch.zeros(len(requests), model.config.vocab_size, dtype=torch.bool, device=device)
    seen_BV.scatter_(1, tokens_BT[rows], True)
    for row, (prompt, _) in enumerate(requests):  # the padding's id was marked too
        seen_BV[row, 0] = 0 in prompt

    results = [Completion("", [], [], False) for _ in requests]
    active = list(range(len(requests)))  # request number of each live row
    for _ in range(sampling.max_tokens):
        logits_BV[:, tokenizer.n_vocab :] = -torch.inf  # padded vocabulary
        if not logits_BV[:, : tokenizer.n_vocab].isfinite().all():
            raise InputError("the model's logits are not finite: the checkpoint is damaged or training diverged")
        next_B = _draw(filtered_probs(logits_BV, seen_BV, sampling), [generators[i] for i in active])
        if sampling.think_budget is not None:
            enough_B = torch.tensor([_overthinks(results[i].ids, tokenizer, sampling.think_budget) for i in active], device=device)
            next_B = next_B.masked_fill(enough_B, tokenizer.special["</think>"])
        logprob_B = logits_BV.float().log_softmax(-1).gather(1, next_B.unsqueeze(1)).squeeze(1)
        keep = []
        for row, (i, token, logprob) in enumerate(zip(active, next_B.tolist(), logprob_B.tolist(), strict=True)):
            if token in stops:
                results[i].stopped = True
                continue
            results[i].ids.append(token)
            results[i].logprobs.append(logprob)
            if len(requests[i][0]) + len(results[i].ids) < limit:
                keep.append(row)
        if not keep:
            break
        if len(keep) < len(active):  # finished rows leave the batch
            active, rows = [active[row] for row in keep], torch.tensor(keep, device=device)
            cache.select(rows)
            next_B, length_B, seen_BV = next_B[rows], length_B[rows], seen_BV[rows]
        seen_BV.scatter_(1, next_B.unsqueeze(1), True)
        logits_BV = model(next_B.unsqueeze(1), positions_BT=length_B.unsqueeze(1), cache=cache)[:, 0]
        length_B = length_B + 1
    for result in results:
        result.text = tokenizer.decode(result.ids)
    return results


def _overthinks(ids, tokenizer, budget):
    """Whether an unfinished answer is inside a thought that has used up its budget."""
    return len(ids) > budget and ids[0] == tokenizer.special["<think>"] and tokenizer.special["</think>"] not in ids


def split_thought(text):
    """('thought', 'answer') of a completion's text; the thought is empty when there is none, the answer when it never came."""
    thought, mark, answer = text.partition("</think>")
    if mark or text.lstrip().startswith("<think>"):
        return thought.replace("<think>", "").strip(), answer.strip()
    return "", text.strip()


def load_for_inference(run, device, stage=None):
    """(model in eval mode, tokenizer) of a run's stage, by default its last."""
    tokenizer = Tokenizer.load(run)
    state = load_latest(run, stage or latest_stage(run), device)
    inherit(state, tokenizer)
    model = load_quantized(state, device) if is_quantized(state) else load_model(state, device)
    return model.eval(), tokenizer


def reply(model, tokenizer, messages, thinking, sampling):
    """Print the model's answer to a chat, its thoughts first; return the answer."""
    ids, _ = tokenizer.encode_chat(messages, thinking=thinking)
    thought, answer = split_thought(generate(model, tokenizer, [ids], sampling)[0].text)
    if thought:
        print(f"  (thinks) {thought}")
    print(f"  {answer}")
    return answer


def main():
    args = cli.parse(
        __doc__, "run", "stage", "device", "seed",
        seed=dict(default=42),
        stage=dict(default=None, help="stage to load (default: the run's last)"),
        prompt=dict(help="answer this and exit (default: chat)"),
        think=dict(action="store_true", help="start with thinking on"),
        budget=dict(type=int, default=None, help="tokens of thought at most (default: no limit)"),
    )  # fmt: skip
    model, tokenizer = load_for_inference(args.run, cli.pick_device(args.device), args.stage)
    sampling, thinking, messages = Sampling(seed=args.seed, think_budget=args.budget), args.think, []
    if args.prompt is not None:
        reply(model, tokenizer, [{"role": "user", "content": args.prompt}], thinking, sampling)
        return
    print("Chat: an empty line starts anew, /think switches thoughts, Ctrl-D ends. Use \\n for a line break.")
    while True:
        try:
            text = input("> ").replace("\\n", "\n")
        except EOFError:
            return
        if text == "/think":
            thinking = not thinking
            print(f"  thinking is {'on' if thinking else 'off'}")
        elif not text.strip():
            messages = []
        else:
            messages.append({"role": "user", "content": text})
            try:
                answer = reply(model, tokenizer, messages, thinking, sampling)
                messages.append({"role": "assistant", "content": answer})
            except InputError as error:  # the chat outgrew the context
                print(f"  {error}; starting anew")
                messages = []


if __name__ == "__main__":
    cli.run(main)
