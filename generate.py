"""Generation: answers to many prompts at once, a stream of one answer, and a chat in the terminal (v2 §5.1 settings).

The work is engine.py's; here are the three ways to use it: `generate` completes every prompt n times, `stream` yields text as it comes,
the chat shows thoughts dimmed.

    python generate.py                                          # chat with runs/demo (/help lists the commands)
    python generate.py --prompt "What is 27 + 45?" --think      # one answer
"""

import contextlib
import sys
from dataclasses import dataclass, replace

import torch

import cli
from checkpoint import inherit, is_quantized, latest_stage, load_latest, load_model
from cli import InputError
from engine import Engine, Sampling
from lowbit import load_quantized
from tokenizer import Tokenizer

GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, repetition=1.0, max_tokens=96)


@dataclass
class Completion:
    """Generated text (thoughts included), its ids without the stop token, and each id's log-probability.

    The text ends before a stop string; the ids keep the tokens that spelt it.
    """

    text: str
    ids: list
    logprobs: list
    stopped: bool  # False when max_tokens or the context ended it


def generate(model, tokenizer, prompts, sampling, n=1, max_rows=64, stops=(), draft=False):
    """Complete each prompt n times; list of Completion, prompt-major.

    prompts: lists of token ids (`Tokenizer.encode_chat` makes them) or strings, encoded as ordinary text. A completion ends at <|end|> or
    <|endoftext|>, at one of the strings `stops`, after sampling.max_tokens, or where the context ends. max_rows bounds the rows decoded
    together, and so the cache: max_rows x (longest prompt and answer) tokens, and beside it once each prompt in work that has several
    answers. draft lets the MTP blocks guess ahead, which changes the speed and not the answers. Raises InputError on an empty prompt, one
    that leaves no room in the context, settings out of range, or logits that are not finite.
    """
    if isinstance(prompts, str):
        raise InputError("prompts is one string: put it into a list")
    ids = [tokenizer.encode(p) if isinstance(p, str) else list(p) for p in prompts]
    if min(n, max_rows) < 1:
        raise InputError(f"n is {n}, max_rows {max_rows}: both must be at least 1")
    if not ids:
        return []
    refuse(sampling.fault())
    slots = max(map(len, ids)) + sampling.max_tokens
    engine = Engine(model, tokenizer, min(max_rows, len(ids) * n), slots, draft)
    requests = [None] * (len(ids) * n)
    for i in sorted(range(len(requests)), key=lambda i: (len(ids[i // n]), i)):  # like lengths decode together
        requests[i] = engine.submit(ids[i // n], sampling, i % n, stops, f"prompt {i // n}")
        refuse(requests[i].error)
    engine.run()
    for request in requests:
        refuse(request.error)
    return [Completion(r.text, r.ids, r.logprobs, r.stopped) for r in requests]


def refuse(fault):
    if fault:
        raise InputError(fault)


def stream(model, tokenizer, prompt, sampling, stops=()):
    """Yield the text of one answer in pieces of whole characters as it is made; drafts with the MTP blocks where the model has them.

    prompt: token ids or a string. Leaving the loop early ends the answer. Raises InputError like `generate`.
    """
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    refuse(sampling.fault())
    engine = Engine(model, tokenizer, 1, len(ids) + sampling.max_tokens, draft=model.config.mtp_depth > 0)
    request = engine.submit(ids, sampling, stops=stops)
    refuse(request.error)
    while not request.done:
        engine.step()
        refuse(request.error)
        if piece := request.new_text(tokenizer):
            yield piece


def split_thought(text):
    """('thought', 'answer') of a completion's text; the thought is empty when there is none, the answer when it never came."""
    thought, mark, answer = text.partition("</think>")
    if mark or text.lstrip().startswith("<think>"):
        return thought.replace("<think>", "").strip(), answer.strip()
    return "", text.strip()


def with_room(sampling, tokenizer, tasks):
    """The sampling, with room for the longest reference and its thought, and a little more."""
    longest = max((len(tokenizer.encode(task.get("think", "") + task["answer"])) for task in tasks), default=0)
    return replace(sampling, max_tokens=max(sampling.max_tokens, longest + 32))


def load_for_inference(run, device, stage=None):
    """(model in eval mode, tokenizer) of a run's stage, by default its last. On a GPU all weights but the router's are bf16."""
    tokenizer = Tokenizer.load(run)
    state = load_latest(run, stage or latest_stage(run))  # the optimizer's moments need not go to the device
    inherit(state, tokenizer)
    model = load_quantized(state, device) if is_quantized(state) else load_model(state, device)
    model.mtp_scale = 0.0  # what evaluation measures is the next token's loss
    if torch.device(device).type == "cuda":
        for name, p in model.named_parameters():
            if not name.endswith("router.weight"):
                p.data = p.data.to(torch.bfloat16)
    return model.eval(), tokenizer


HELP = """  /think  switch thoughts on or off      /new    start anew (an empty line does too)
  /help   this list                      Ctrl-C  stops an answer, Ctrl-D ends the chat; type \\n for a line break"""


def shown(piece, colours):
    """A piece of an answer as the terminal shows it: thoughts dimmed, or merely announced where there are no colours."""
    dim, plain = ("\033[2m", "\033[0m") if colours else ("", "")
    return piece.replace("\n", "\n  ").replace("<think>", f"{dim} (thinks)").replace("</think>", f"{plain}\n ")


def reply(model, tokenizer, messages, thinking, sampling):
    """Print the model's answer to a chat as it comes, thoughts first; return the answer. Ctrl-C ends it where it stands."""
    ids, _ = tokenizer.encode_chat(messages, thinking=thinking)
    colours, text = sys.stdout.isatty(), ""
    try:
        for piece in stream(model, tokenizer, ids, sampling):
            print(shown(piece, colours) if text else " " + shown(piece, colours), end="", flush=True)
            text += piece
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    print("\033[0m" if colours else "")
    return split_thought(text)[1]


def fit_context(tokenizer, messages, thinking, limit):
    """Drop the oldest turns until a quarter of the context is free for the answer; says so."""
    kept = list(messages)
    while len(kept) > 1 and len(tokenizer.encode_chat(kept, thinking=thinking)[0]) > limit * 3 // 4:
        kept = kept[2:]
    if len(kept) < len(messages):
        print(f"  [the oldest {len(messages) - len(kept)} messages no longer fit the context of {limit} tokens]")
    return kept


def chat(model, tokenizer, sampling, thinking):
    """Read lines and answer them until the input ends."""
    with contextlib.suppress(ImportError):  # line editing and history, where the system has them
        import readline  # noqa: F401
    messages = []
    print(HELP)
    while True:
        try:
            text = input("> ").replace("\\n", "\n")
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise InputError(f"what was typed is not UTF-8: {error}") from None
        except KeyboardInterrupt:
            print()
            continue
        if text == "/think":
            thinking = not thinking
            print(f"  thinking is {'on' if thinking else 'off'}")
        elif text == "/help":
            print(HELP)
        elif not text.strip() or text == "/new":
            messages = []
        elif text.startswith("/"):
            print(f"  {text} is no command; /help lists them")
        else:
            messages = fit_context(tokenizer, [*messages, {"role": "user", "content": text}], thinking, model.config.max_seq_len)
            try:
                answer = reply(model, tokenizer, messages, thinking, sampling)
                messages.append({"role": "assistant", "content": answer})
            except InputError as error:  # this one message alone outgrows the context
                print(f"  {error}; starting anew")
                messages = []


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
    sampling = Sampling(seed=args.seed, think_budget=args.budget)
    if args.prompt is not None:
        reply(model, tokenizer, [{"role": "user", "content": args.prompt}], args.think, sampling)
    else:
        chat(model, tokenizer, sampling, args.think)


if __name__ == "__main__":
    cli.run(main)
