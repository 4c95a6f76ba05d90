"""Byte-level BPE for South-East Asia: three sub-tokenizers trained apart, merged into one (v2 §2.1.3).

A tokenizer trained on everything at once gives its vocabulary to whoever has the most text. Compass trains one BPE on its eight main
languages, one on nine European ones and one on Chinese, then merges them: main first, then what European and Chinese add. The result is a
plain tiktoken rank table, so encoding runs at tiktoken's speed; training is ours and is written below.

    python tokenizer.py                                    # laptop: embedded data, 4k vocabulary
    python tokenizer.py --data corpus --config v2_30b      # node: 150k + 20k + 50k merged to 180k
"""

import base64
import gc
import glob
import hashlib
import heapq
import itertools
import json
import os
from collections import Counter, defaultdict

import regex
import tiktoken

import cli
from cli import InputError

# Words keep one leading space; combining marks stay with their letters (a bare \p{L}+ would cut Thai
# at every vowel sign); digits are single tokens so that arithmetic sees place values.
PATTERN = r" ?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s"
SPECIAL_TOKENS = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<think>", "</think>")
ROLES = ("system", "user", "assistant")
THINK_PROMPT = "Think step by step between <think> and </think>, then answer."
MAIN = ("en", "zh", "id", "ms", "pt", "tl", "th", "vi")
EUROPEAN = ("nl", "fr", "de", "el", "it", "pl", "ru", "es", "uk")
SUB_TOKENIZERS = {"main": MAIN, "european": EUROPEAN, "chinese": ("zh",)}
SPLIT = (150, 20, 50)  # the report's sizes of the three, in 180ths of the merged vocabulary


def characters(token):
    """Number of characters a token starts: its bytes that are not UTF-8 continuation bytes."""
    return sum(byte & 0xC0 != 0x80 for byte in token)


def bpe(parts, ranks):
    """Merge a list of bytes objects, lowest rank first and leftmost among equals, until nothing merges.

    This is the encoder by merges alone. tiktoken first looks the whole chunk up and so would hide a token that merges never reach.
    """
    while True:
        best = min(((ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in ranks), default=None)
        if best is None:
            return parts
        i = best[1]
        parts = [*parts[:i], parts[i] + parts[i + 1], *parts[i + 2 :]]


def to_bytes(chunk):
    return [bytes([byte]) for byte in chunk]


words_of = regex.compile(PATTERN).findall


def symbol(rank):
    """The one character that stands for a token while training (surrogates are skipped)."""
    return chr(rank if rank < 0xD800 else rank + 0x800)


def train_bpe(texts, vocab_size, max_token_chars=16):
    """Train byte-level BPE on an iterable of str; return {token bytes: rank}, the 256 bytes first.

    The most frequent adjacent pair of tokens becomes a token; of equals, the pair with the smaller ranks. Every word is always held as the
    encoder would encode it. Stops early when no pair is left that occurs twice. Raises InputError when vocab_size is below 256.
    """
    counts = Counter()
    for text in texts:
        counts.update(words_of(text))
    return train_on_counts(counts, vocab_size, max_token_chars)


def train_on_counts(counts, vocab_size, max_token_chars=16):
    """train_bpe on {word: how often it occurs}; all that training needs of a corpus, and much less than its text."""
    if vocab_size < 256:
        raise InputError(f"vocab_size is {vocab_size}, must be at least 256 (the bytes)")
    gc.disable()  # millions of lists and not one cycle: the collector would only cost time
    try:
        return merge_pairs(list(counts), list(counts.values()), vocab_size, max_token_chars)
    finally:
        gc.enable()


def merge_pairs(words, freqs, vocab_size, max_token_chars):
    """The loop of training over distinct words and how often each occurs."""
    # A word is a str with one character per token: a pair is then a two-letter str, a merge a split and a join.
    words = [word.encode().decode("latin-1") for word in words]
    ranks = {bytes([i]): i for i in range(256)}
    spelling = {symbol(i): token for token, i in ranks.items()}
    where = defaultdict(list)  # pair -> words that hold, or once held, it; once for each occurrence when new
    for w, word in enumerate(words):
        for pair in map(str.__add__, word, word[1:]):
            where[pair].append(w)
    counts = defaultdict(int, {pair: sum(map(freqs.__getitem__, holders)) for pair, holders in where.items()})
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    while heap and len(ranks) < vocab_size:
        negative, pair = heapq.heappop(heap)
        count = counts[pair]
        if count != -negative:  # stale: counts that grew were pushed again, counts that fell were not
            if 1 < count < -negative:
                heapq.heappush(heap, (-count, pair))
            continue
        token = spelling[pair[0]] + spelling[pair[1]]
        if count < 2 or characters(token) > max_token_chars:
            continue
        new, (left, right), born = symbol(len(ranks)), pair, defaultdict(list)
        ranks[token], spelling[new] = len(ranks), token
        # No other pair spells the same bytes, though a rank table could not tell them apart: no merge has crossed the borders of what
        # stands between two tokens, so it is merged alike wherever it stands.
        for w in where.pop(pair):
            parts = words[w].split(pair)
            if len(parts) == 1:  # no longer there
                continue
            words[w], freq, inside = new.join(parts), freqs[w], False
            for before, after in itertools.pairwise(parts):  # what stands around each occurrence; no other pairs change
                if before:
                    counts[before[-1] + left] -= freq
                    born[before[-1] + new].append(w)
                elif inside:  # two occurrences touch
                    counts[right + left] -= freq
                    born[new + new].append(w)
                if after:
                    counts[right + after[0]] -= freq
                    born[new + after[0]].append(w)
                inside = True
        where.update(born)
        for grown, holders in born.items():
            counts[grown] = sum(map(freqs.__getitem__, holders))
            if counts[grown] > 1:
                heapq.heappush(heap, (-counts[grown], grown))
    return ranks


def merge_vocabularies(list_of_ranks, vocab_size):
    """Concatenate rank tables in order, drop duplicates and unreachable tokens, renumber: {bytes: rank}.

    A token that came from one table may no longer be what BPE makes of its own bytes once another
    table's merges rank before it; such tokens would never be emitted and are dropped, again and
    again until `bpe(token) == [token]` holds for all. The result has at most `vocab_size` tokens.
    """
    tokens = list(dict.fromkeys(token for ranks in list_of_ranks for token in sorted(ranks, key=ranks.get)))
    while True:
        ranks = {token: rank for rank, token in enumerate(tokens)}
        kept = [token for token in tokens if bpe(to_bytes(token), ranks) == [token]]
        if len(kept) == len(tokens) <= vocab_size:
            return ranks
        tokens = kept if len(kept) < len(tokens) else kept[:vocab_size]


class Tokenizer:
    """A rank table with our pattern and special tokens, encoding through tiktoken."""

    def __init__(self, ranks, pattern=PATTERN, special_tokens=SPECIAL_TOKENS):
        self.ranks, self.pattern = ranks, pattern
        self.special = {token: len(ranks) + i for i, token in enumerate(special_tokens)}
        self.encoding = tiktoken.Encoding("compass", pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special)
        self.n_vocab = len(ranks) + len(self.special)
        self.hash = hashlib.sha256(self._rank_lines() + json.dumps([pattern, self.special]).encode()).hexdigest()

    def _rank_lines(self):
        return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in self.ranks.items())

    def save(self, path):
        """Write `path`/tokenizer.tiktoken (base64 token, space, rank) and tokenizer.json beside it."""
        settings = json.dumps({"pattern": self.pattern, "special_tokens": list(self.special)}, indent=1).encode()
        for name, content in (("tokenizer.json", settings), ("tokenizer.tiktoken", self._rank_lines())):
            cli.write_atomically(os.path.join(path, name), content)

    @classmethod
    def load(cls, path):
        """Load from a run folder."""
        file = os.path.join(path, "tokenizer.tiktoken")
        if not os.path.exists(file):
            raise InputError(f"{file} not found: run `python tokenizer.py --run {path}` first")
        ranks = {}
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    token, rank = line.split()
                    ranks[base64.b64decode(token, validate=True)] = int(rank)
                except ValueError:  # of split, int or base64
                    raise InputError(f"{file}:{number}: not a rank line: {line[:60]!r}") from None
        if sorted(ranks.values()) != list(range(len(ranks))) or not ranks.keys() >= {bytes([i]) for i in range(256)}:
            raise InputError(f"{file}: {len(ranks)} ranks; need all 256 bytes and no gaps from 0 on (a torn file?)")
        file = os.path.join(path, "tokenizer.json")
        with open(file, encoding="utf-8") as lines:
            try:
                settings = json.load(lines)
                tokenizer = cls(ranks, settings["pattern"], settings["special_tokens"])
                if not tokenizer.special.keys() >= set(SPECIAL_TOKENS):
                    raise ValueError
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{file}: not what `Tokenizer.save` wrote (a torn file?)") from None
        return tokenizer

    def encode(self, text):
        """Ids of `text` as ordinary text: no text can form a special token."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids):
        """Text of ids; bytes that are not UTF-8 come out as U+FFFD."""
        return self.encoding.decode(ids)

    def encode_chat(self, messages, thinking=False, full_loss=False):
        """Render a chat (v2 §3.2); return (ids, loss_mask), two lists of equal length.

        messages: [{"role": "system" | "user" | "assistant", "content": str, "think"?: str}, …]. Each turn is `<|role|> content<|end|>`;
        with the space the first word is the same token as inside a sentence, which is what copying an answer from a text needs. A last turn
        that is not the assistant's is followed by `<|assistant|>`, ready to generate. thinking=True adds THINK_PROMPT to the system turn
        and `<think>…</think>` to the last answer; older thoughts are never shown. loss_mask[i] is 1 when token i is to be predicted: the
        assistant's content and its `<|end|>`, with thinking only the last answer's (the older ones stand there without the thought that was
        asked for), or with full_loss every token but the first. Raises InputError on an unknown role or a message without text.
        """
        messages = list(messages)
        for i, message in enumerate(messages):
            fields = message if isinstance(message, dict) else {}
            if fields.get("role") not in ROLES or not all(isinstance(x, str) for x in (fields.get("content"), fields.get("think", ""))):
                raise InputError(f"message {i}: need a role ({', '.join(ROLES)}) and text, got {message!r}")
        if thinking:
            system = messages.pop(0)["content"] + "\n" if messages and messages[0]["role"] == "system" else ""
            messages.insert(0, {"role": "system", "content": system + THINK_PROMPT})
        ids, mask = [], []
        for i, message in enumerate(messages):
            role = message["role"]
            body = self.encode(" " + message["content"]) + [self.special["<|end|>"]]
            if role == "assistant" and thinking and i == len(messages) - 1 and message.get("think"):
                thought = self.encode(" " + message["think"])
                body = [self.special["<think>"], *thought, self.special["</think>"], *body]
            ids += [self.special[f"<|{role}|>"], *body]
            mask += [0, *[int(role == "assistant" and (not thinking or i == len(messages) - 1))] * len(body)]
        if not messages or messages[-1]["role"] != "assistant":
            ids.append(self.special["<|assistant|>"])
            mask.append(0)
        if full_loss:
            mask = [0] + [1] * (len(ids) - 1)
        return ids, mask


def train(documents, vocab_size, split=SPLIT):
    """Train the three sub-tokenizers on dicts with "text" and "lang" and merge them; return a Tokenizer.

    Text of no stated language goes to the main part. A part without text is skipped, and a line says so.
    """
    budget = vocab_size - len(SPECIAL_TOKENS)
    counts = defaultdict(Counter)
    for document in documents:
        words = words_of(document["text"])
        for part, languages in SUB_TOKENIZERS.items():
            if document["lang"] in languages or (part == "main" and document["lang"] is None):
                counts[part].update(words)
    if not counts:
        raise InputError(f"no text to train on in any of the languages {', '.join(MAIN + EUROPEAN)} (every twentieth document is held out)")
    tables = []
    for part, share in zip(SUB_TOKENIZERS, split, strict=True):
        if part not in counts:
            print(f"sub-tokenizer {part}: no text in its languages, skipped")
            continue
        tables.append(train_on_counts(counts.pop(part), max(256, budget * share // 180)))
        print(f"sub-tokenizer {part}: {len(tables[-1])} tokens")
    ranks = merge_vocabularies(tables, budget)
    union = len(set().union(*tables))
    print(f"merged: {sum(map(len, tables))} tokens, {union} different, {len(ranks)} reachable and kept")
    return Tokenizer(ranks)


def parse_split(text):
    """ "150/20/50" to (150, 20, 50). Raises InputError."""
    parts = text.split("/")
    if len(parts) != len(SUB_TOKENIZERS) or not all(part.isdecimal() and int(part) for part in parts):
        raise InputError(f"--split {text}: need three positive numbers such as 150/20/50 (main, European, Chinese; in 180ths)")
    return tuple(map(int, parts))


def main():
    args = cli.parse(
        __doc__, "config", "data", "run", "seed",
        split=dict(default="150/20/50", help="sizes of main, European and Chinese vocabulary in 180ths of the whole (the report's)"),
    )  # fmt: skip
    from compass import config_named
    from data.reader import documents

    tokenizer = train(documents(args.data, "general", args.seed), config_named(args.config).vocab_size, parse_split(args.split))
    there = all(glob.glob(os.path.join(glob.escape(args.run), name)) for name in ("tokenizer.tiktoken", "*/step_*.pt"))
    if there and Tokenizer.load(args.run).hash != tokenizer.hash:
        raise InputError(f"{args.run} holds checkpoints that need its present tokenizer, which is another: name another --run")
    tokenizer.save(args.run)
    sample = "Beli 2 kemeja katun, harga Rp45.000 / ซื้อเสื้อ 2 ตัว / 买两件衬衫"
    ids = tokenizer.encode(sample)
    print(f"{sample!r}: {len(sample.encode())} bytes, {len(ids)} tokens")
    print(f"saved {args.run}/tokenizer.tiktoken: {tokenizer.n_vocab} tokens, hash {tokenizer.hash[:12]}")


if __name__ == "__main__":
    cli.run(main)
