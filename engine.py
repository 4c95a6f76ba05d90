"""The engine of generation: sampling, requests that come and go, drafting with the MTP blocks (v2 §5.1; v3).

Every live request owns one row of the cache. A finished request leaves and a waiting one enters its row while the others go on where
they are. A prompt that several waiting requests share is held once, as a prefix beside the rows. Prefill fills the slots of all tokens
of a prompt but the last; the last one enters the common step like every token after it.

A step runs one token of every row, and with drafting a few more that the MTP blocks have guessed. The token at each place is drawn
from the model's own distribution with the request's own random number for that place; the next guess stands as long as it equals what
was drawn. So drafting changes the speed and not the answer, greedy or sampled, and what a request gets depends on its seed,
prompt and number alone (up to rounding of the logits: other batch shapes sum in another order, which with quantized weights on a CPU,
whose sums are bf16, now and then shows).

Shapes: B rows, A of them that draw a token at a place, R rows of the whole cache, T tokens of a step (one and its drafts), D model width,
V vocabulary, K candidates.

    python engine.py      # 100 random requests to a random model: steps, tokens, memory
"""

import codecs
import random
import zlib
from collections import Counter, deque
from dataclasses import dataclass, field
from numbers import Integral, Real

import torch
import torch.nn.functional as F

import cli
from kvcache import KVCache

PREFILL_TOKENS = 8192  # tokens prefilled at once, padding included, unless one prompt alone is longer: bounds the activations


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

    def fault(self):
        """What is wrong with the settings, as a sentence, or None."""
        number, whole = lambda x: isinstance(x, Real), lambda x: isinstance(x, Integral)  # numpy's, too
        heat, budget = self.temperature, self.think_budget
        checks = {
            "max_tokens": (whole(self.max_tokens) and self.max_tokens >= 1, "a whole number of at least 1"),
            "temperature": (number(heat) and (heat == 0 or 1e-6 <= heat < float("inf")), "0 or at least 1e-6"),
            "top_k": (whole(self.top_k) and self.top_k >= 0, "a whole number of at least 0"),
            "top_p": (number(self.top_p) and 0 < self.top_p <= 1, "above 0 and at most 1"),
            "repetition": (number(self.repetition) and 1e-6 <= self.repetition <= 1e6, "from 1e-6 to 1e6"),
            "think_budget": (budget is None or whole(budget) and budget >= 0, "a whole number of at least 0"),
        }  # fmt: skip
        return next((f"{name} is {getattr(self, name)}, must be {need}" for name, (fine, need) in checks.items() if not fine), None)


def candidates(logits_BV, seen_BV, sampling):
    """What may be drawn: (probs_BK, ids_BK), fp32 and best first; ids None means all V in order.

    Repetition penalty, then temperature, then top-k, then top-p. seen_BV marks tokens of the prompt and the answer so far; their
    positive logits are divided and their negative ones multiplied by the penalty. Greedy leaves one candidate.
    """
    logits_BV = logits_BV.float()
    if sampling.repetition != 1:
        penalised = torch.where(logits_BV > 0, logits_BV / sampling.repetition, logits_BV * sampling.repetition)
        logits_BV = torch.where(seen_BV, penalised, logits_BV)
    if sampling.temperature == 0:
        ids_B1 = logits_BV.argmax(1, keepdim=True)
        return torch.ones_like(ids_B1, dtype=torch.float32), ids_B1
    if not sampling.top_k and sampling.top_p >= 1:  # nothing to filter, so nothing to sort
        return (logits_BV / sampling.temperature).softmax(-1), None
    V = logits_BV.shape[1]
    top_BK, ids_BK = logits_BV.topk(min(sampling.top_k or V, V))
    probs_BK = (top_BK / sampling.temperature).softmax(-1)
    # nucleus: the smallest set of top tokens whose mass reaches top_p, the one that crosses it included
    probs_BK = probs_BK * (probs_BK.cumsum(-1) - probs_BK < sampling.top_p)
    return probs_BK / probs_BK.sum(-1, keepdim=True), ids_BK


def filtered_probs(logits_BV, seen_BV, sampling):
    """The distribution of `candidates` over the whole vocabulary, (B, V) fp32."""
    probs_BK, ids_BK = candidates(logits_BV, seen_BV, sampling)
    return probs_BK if ids_BK is None else torch.zeros_like(logits_BV, dtype=torch.float32).scatter_(1, ids_BK, probs_BK)


def draw(probs_BK, ids_BK, u_B1):
    """One id per row by inverse transform of u, uniform in [0, 1), fp64."""
    if probs_BK.shape[1] == 1:
        return ids_BK.squeeze(1)
    cdf_BK = probs_BK.cumsum(-1, dtype=torch.float64)
    pick_B1 = torch.searchsorted(cdf_BK, u_B1 * cdf_BK[:, -1:], right=True).clamp_max(probs_BK.shape[1] - 1)
    return (pick_B1 if ids_BK is None else ids_BK.gather(1, pick_B1)).squeeze(1)


@dataclass(eq=False)
class Request:
    """One requested answer and its progress. error: why it was refused or broken off; done: no more tokens will come."""

    prompt: tuple
    sampling: Sampling
    sample: int = 0  # number of the answer among those to the same prompt: gives it its own random stream
    stops: tuple = ()  # strings that end the answer; it is cut before them
    room: int = 0  # tokens it may have
    ids: list = field(default_factory=list)
    logprobs: list = field(default_factory=list)
    text: str = ""  # complete characters, final once done
    stopped: bool = False  # by a stop token or string, not by max_tokens, the context or a cancellation
    done: bool = False
    error: str | None = None
    next: list = field(default_factory=list)  # the token the next step runs, and the drafts after it; -1 is no draft
    prefix: KVCache | None = None  # where its prompt is, if not in its own row
    uniforms: list | None = None  # a random number for each place: a function of seed, prompt and sample

    def __post_init__(self):
        key = f"{self.sampling.seed}-{zlib.crc32(str(list(self.prompt)).encode())}-{self.sample}".encode()
        self.generator = torch.Generator().manual_seed(zlib.crc32(key))
        self.decoder, self.decoded, self.shown = codecs.getincrementaldecoder("utf-8")("replace"), 0, 0

    def read(self, tokenizer, final=False):
        """Bring `text` up to the last token; a stop string in it ends the request. Only whole characters, unless this is the end."""
        fresh, self.decoded = tokenizer.encoding.decode_bytes(self.ids[self.decoded :]), len(self.ids)
        self.text += self.decoder.decode(fresh, final)
        ends = [at for stop in self.stops if (at := self.text.find(stop)) >= 0]
        if ends:
            self.text, self.stopped, self.done = self.text[: min(ends)], True, True
            self.decoder.reset()

    def new_text(self, tokenizer):
        """The text since the last call; what may yet become a stop string is held back."""
        held = 0
        if not self.done:
            self.read(tokenizer)
            held = max((n for stop in self.stops for n in range(1, len(stop)) if self.text.endswith(stop[:n])), default=0)
        piece = self.text[self.shown : len(self.text) - held]
        self.shown += len(piece)
        return piece


class Engine:
    """Runs requests to one model, up to `rows` together with `slots` tokens each (prompt and answer).

    Memory: the cache of rows x slots, taken at the start, and a prefix for each prompt that live or waiting requests share, but no more
    prefixes than rows: `bytes`, what is held now, is never over twice the cache. While prompts are prefilled, PREFILL_TOKENS of theirs
    lie beside it. submit, then step (or run) until nothing is left; cancel at any time.
    """

    def __init__(self, model, tokenizer, rows=64, slots=None, draft=False):
        self.model, self.tokenizer = model, tokenizer
        self.drafts = model.config.mtp_depth if draft else 0
        self.slots = min(slots or model.config.max_seq_len, model.config.max_seq_len)
        weight = model.embedding.weight
        self.device = weight.device
        self.cache = KVCache(model.config, rows, self.slots + self.drafts, weight.device, weight.dtype, bool(self.drafts))
        self.seen_RV = torch.zeros(rows, tokenizer.n_vocab, dtype=torch.bool, device=weight.device)
        self.live, self.waiting = [], deque()  # live[row] is a request, or None in a row that waits for its next one
        self.users, self.prefixes = Counter(), {}  # of each prompt: unfinished requests; its KVCache where they share it
        self.stop_ids = {tokenizer.special["<|end|>"], tokenizer.special["<|endoftext|>"]}
        self.steps = self.drafted = self.accepted = 0

    @property
    def bytes(self):
        return self.cache.bytes + sum(prefix.bytes for prefix in self.prefixes.values())

    def submit(self, prompt, sampling, sample=0, stops=(), name="the prompt"):
        """Queue a request and return it; a faulty one comes back refused: done, with `error`."""
        request = Request(tuple(map(int, prompt)), sampling, sample, (stops,) if isinstance(stops, str) else tuple(stops))
        request.error = self._fault(request, name) or sampling.fault()
        request.done = request.error is not None
        if not request.done:
            request.room = min(sampling.max_tokens, self.slots - len(request.prompt))
            request.next = [request.prompt[-1]] + [-1] * self.drafts
            self.waiting.append(request)
            self.users[request.prompt] += 1
        return request

    def _fault(self, request, name):
        if not 0 < len(request.prompt) < self.slots:
            return f"{name} has {len(request.prompt)} tokens; 1 to {self.slots - 1} leave room for an answer here"
        if not all(0 <= i < self.tokenizer.n_vocab for i in request.prompt):
            return f"{name} holds a token id outside the vocabulary 0..{self.tokenizer.n_vocab - 1}"
        if not all(isinstance(stop, str) and stop for stop in request.stops):
            return f"{name} has an empty stop string, or a stop that is no text"

    def cancel(self, request):
        """End a request where it stands; what it has said stays in it."""
        if not request.done:
            request.done = True
            self._leave(request)

    def _leave(self, request):
        """Free what a request that is done holds."""
        request.read(self.tokenizer, final=True)
        if request in self.live:
            row = self.live.index(request)
            self.live[row], self.cache.first_B[row] = None, 0
            if request.error:  # even what is never seen must be finite: 0 * NaN is NaN
                self.cache.k[:, row], self.cache.v[:, row] = 0.0, 0.0
        else:  # cancelled while it waited
            self.waiting.remove(request)
        request.prefix = request.uniforms = None
        self.users[request.prompt] -= 1
        if not self.users[request.prompt]:
            del self.users[request.prompt]
            self.prefixes.pop(request.prompt, None)

    def run(self):
        while self.step():
            pass

    @torch.inference_mode()
    def step(self):
        """Let waiting requests in and run one step of all rows; return whether anything is left to do."""
        self._admit()
        if not self.live:
            return False
        cache = self.cache.rows(len(self.live))
        cache.shared = self._shared()
        tokens = [request.next if request else [0] * (1 + self.drafts) for request in self.live]
        tokens_BT = torch.tensor(tokens, device=self.device).clamp_min(0)
        start_B = torch.tensor([len(r.prompt) + len(r.ids) - 1 if r else 0 for r in self.live], device=self.device)
        positions_BT = start_B.unsqueeze(1) + torch.arange(1 + self.drafts, device=self.device)
        h_BTD, _, rope, _ = self.model.hidden(tokens_BT, positions_BT=positions_BT, cache=cache)
        logits_BTV = self.model.head(self.model.norm(h_BTD))[..., : self.tokenizer.n_vocab]
        self.steps += 1
        taken = self._take(tokens, logits_BTV)
        if self.drafts:
            last_B = torch.tensor([max(0, len(row) - 1) for row in taken], device=self.device)
            ahead_BT = torch.tensor([row + [0] * (1 + self.drafts - len(row)) for row in taken], device=self.device)
            drafts = self._draft(cache, h_BTD, ahead_BT, last_B, rope)
        for row, request in enumerate(self.live):
            if request and not request.done:
                request.next = [taken[row][-1], *(drafts[row] if self.drafts else ())]
            elif request:
                self._leave(request)
        return bool(self.waiting) or any(self.live)

    def _admit(self):
        """Fill free rows with waiting requests; when none waits, the last row moves into a row that stands empty."""
        free = [row for row, request in enumerate(self.live) if request is None]
        free += range(len(self.live), len(self.seen_RV))
        # a handful of prompts prefilled together costs little more than one
        if len(free) >= min(len(self.waiting), len(self.seen_RV) // 8):
            entering = list(zip(free, self.waiting, strict=False))
            self._prefill(entering)  # while they wait: where it fails (out of memory, Ctrl-C), they wait on
            for row, request in entering:
                request.uniforms = torch.rand(request.room, generator=request.generator, dtype=torch.float64).tolist()
                request.prefix = self.prefixes.get(request.prompt)
                self.cache.first_B[row] = len(request.prompt) - 1 if request.prefix else 0
                self.seen_RV[row] = False
                self.seen_RV[row, list(request.prompt)] = True
                self.live[row : row + 1] = [self.waiting.popleft()]
        while not self.waiting and None in self.live:
            moved = self.live.pop()
            last = len(self.live)
            if moved:
                row = self.live.index(None)
                self.live[row] = moved
                self.cache.write(row, self.cache, last, len(moved.prompt) + len(moved.ids))
                self.cache.first_B[row], self.seen_RV[row] = self.cache.first_B[last], self.seen_RV[last]

    def _prefill(self, entering):
        """Fill the slots of all prompt tokens but the last, each prompt once for all requests that enter or wait."""
        prompts = dict.fromkeys(request.prompt for _, request in entering if len(request.prompt) > 1)
        fresh = sorted((prompt for prompt in prompts if prompt not in self.prefixes), key=len)
        while fresh:
            together = [fresh.pop()]  # the longest, and as many of the next as fit and are not mostly padding
            width = len(together[0]) - 1
            while fresh and (len(together) + 1) * width <= PREFILL_TOKENS and 2 * len(fresh[-1]) > width:
                together.append(fresh.pop())
            self._prefill_batch(together, width, entering)

    def _prefill_batch(self, prompts, width, entering):
        padded = [list(prompt) + [0] * (width + 1 - len(prompt)) for prompt in prompts]
        tokens_BT = torch.tensor(padded, device=self.device)
        cache = KVCache(self.model.config, len(prompts), width, self.device, self.cache.k.dtype, bool(self.drafts))
        h_BTD, _, rope, _ = self.model.hidden(tokens_BT[:, :-1], cache=cache)
        if self.drafts:
            self._draft(cache, h_BTD, tokens_BT[:, 1:], torch.tensor([len(p) - 2 for p in prompts], device=self.device), rope)
        for filled, prompt in enumerate(prompts):
            if self.users[prompt] > 1 and len(self.prefixes) < len(self.seen_RV):
                self.prefixes[prompt] = cache.prefix(filled, len(prompt) - 1)
            else:
                for row, request in entering:
                    if request.prompt == prompt:
                        self.cache.write(row, cache, filled, len(prompt) - 1)

    def _shared(self):
        """[(prefix, its rows)] for the cache."""
        rows = {}
        for row, request in enumerate(self.live):
            if request and request.prefix:
                rows.setdefault(request.prefix, []).append(row)
        return [(prefix, slice(None) if len(r) == len(self.live) else torch.tensor(r, device=self.device)) for prefix, r in rows.items()]

    def _take(self, tokens, logits_BTV):
        """Draw the token at every place; a row goes on to its next place while its draft was right. Returns each row's new tokens."""
        taken = [[] for _ in tokens]
        rows = [row for row, request in enumerate(self.live) if request]
        for place in range(1 + self.drafts):
            drawn = self._draw(logits_BTV[:, place], rows) if rows else ((), ())
            going = []
            for row, token, logprob in zip(rows, *drawn, strict=True):
                request = self.live[row]
                self._append(request, token, logprob)
                taken[row].append(token)
                if place < self.drafts and not request.done:
                    self.drafted += tokens[row][place + 1] >= 0
                    if token == tokens[row][place + 1]:
                        going.append(row)
            self.accepted += len(going)
            rows = going
        return taken

    def _draw(self, logits_BV, rows):
        """(ids, log-probabilities) of these rows' next tokens, two lists."""
        requests = [self.live[row] for row in rows]
        logits_AV = logits_BV if len(rows) == len(logits_BV) else logits_BV[rows]
        kinds = {}  # requests with the same settings are drawn together
        for i, request in enumerate(requests):
            s = request.sampling
            kinds.setdefault((s.temperature, s.top_k, s.top_p, s.repetition), []).append(i)
        ids_A = torch.empty(len(rows), dtype=torch.int64, device=self.device)
        u_A1 = torch.tensor([[request.uniforms[len(request.ids)]] for request in requests], dtype=torch.float64, device=self.device)
        for chosen in kinds.values():
            some = slice(None) if len(chosen) == len(rows) else chosen
            sampling = requests[chosen[0]].sampling
            seen = self.seen_RV[[rows[i] for i in chosen]] if sampling.repetition != 1 else None
            ids_A[some] = draw(*candidates(logits_AV[some], seen, sampling), u_A1[some])
        opened, closed = self.tokenizer.special["<think>"], self.tokenizer.special["</think>"]
        for i, request in enumerate(requests):
            ids, budget = request.ids, request.sampling.think_budget
            if budget is not None and len(ids) > budget and ids[0] == opened and closed not in ids:
                ids_A[i] = closed
        if any(request.sampling.repetition != 1 for request in requests):
            self.seen_RV[rows, ids_A] = True
        return ids_A.tolist(), (-F.cross_entropy(logits_AV.float(), ids_A, reduction="none")).tolist()

    def _append(self, request, token, logprob):
        """Give a request its next token; ends it at a stop, at its last token, or when the logits were not finite."""
        if not logprob > -torch.inf:  # NaN too
            request.error = "the model's logits are not finite: the checkpoint is damaged or training diverged"
            request.done = True
        elif token in self.stop_ids:
            request.stopped = request.done = True
        else:
            request.ids.append(token)
            request.logprobs.append(logprob)
            request.done = len(request.ids) == request.room
            if request.stops:
                request.read(self.tokenizer)

    def _draft(self, cache, h_BTD, ahead_BT, last_B, rope):
        """The MTP blocks' guesses after each row's last new token (v3), a list of one per block for each row.

        ahead_BT[b, t] is the token after position t. Block k joins the state of the block before with the token k places ahead; after
        the last known token that is the guess just made. Entries beyond last_B are garbage that later steps overwrite; what a second
        block keeps at last_B was made of a guess, right or wrong: that can cost drafts, never answers.
        """
        row_B, guesses, model = torch.arange(len(last_B), device=self.device), [], self.model
        for k, block in enumerate(model.mtp):
            h_BTD = block(h_BTD, model.embedding(ahead_BT), rope, None, cache, model.config.n_layers + k)
            guess_B = model.head(model.norm(h_BTD[row_B, last_B]))[:, : self.tokenizer.n_vocab].argmax(-1)
            guesses.append(guess_B)
            ahead_BT = ahead_BT.roll(-1, 1)
            ahead_BT[row_B, last_B] = guess_B
        return torch.stack(guesses, 1).tolist()


def main():
    from compass import CONFIGS, Compass
    from tokenizer import Tokenizer, train_bpe

    cli.parse(__doc__)
    torch.manual_seed(0)
    rng = random.Random(0)
    tokenizer = Tokenizer(train_bpe(["a few words, so that the ids exist"] * 2, 300))
    engine = Engine(Compass(CONFIGS["tiny"]).eval(), tokenizer, rows=16)
    requests = [engine.submit([rng.randrange(256) for _ in range(rng.randint(1, 40))], Sampling(max_tokens=20)) for _ in range(100)]
    engine.run()
    print(f"100 answers, {sum(len(r.ids) for r in requests)} tokens, in {engine.steps} steps; {engine.bytes / 1e6:.1f} MB of cache")


if __name__ == "__main__":
    cli.run(main)
