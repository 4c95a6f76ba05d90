"""Needle in a haystack and line retrieval: is what stands far back in a long text still found? (v2 §2.3.)

The haystack is made of marketplace pages; the needle says where a parcel lies, `hat red: Cebu`, at a chosen depth; the
text ends with the parcel and a colon, and the city is what has to follow (twelve cities: guessing finds 8 %). Line
retrieval has no pages: every line is such a parcel, and one of them is wanted.

    python -m data.needles      # one of each
"""

import random

import cli
from data.market import LANGUAGES, draw_product, ledger_lines, page


def needle(tokenizer, lang, rng, length, depth):
    """(prompt, answer): `length` tokens in all, the needle at `depth` (0 first, 1 last) of the haystack, to the nearest gap between
    pages: in a short text, of two or three pages, neighbouring depths may be one place."""
    (line,) = ledger_lines(lang, rng, 1)
    name, answer = line.split(":")
    pages, room = [], length - len(tokenizer.encode(f"{line}\n\n{name}:{answer}"))
    while room > 0:
        pages.append(page(draw_product(rng, "test"), lang, rng, "test"))
        room -= len(tokenizer.encode(pages[-1] + "\n\n"))
    if pages and room < 0:  # the last page is cut so that the length is met
        pages[-1] = tokenizer.decode(tokenizer.encode(pages[-1])[:room]).rstrip("\ufffd")
    pages.insert(round(depth * len(pages)), line)
    return "\n\n".join([*pages, name + ":"]), answer


def line_retrieval(tokenizer, lang, rng, length):
    """(prompt, answer): lines of at most `length` tokens in all (or as many as there are), one of which is wanted."""
    lines, room = [], length - 12
    for line in ledger_lines(lang, rng, 200):
        room -= len(tokenizer.encode(line + "\n\n"))
        if room < 0 and lines:  # one line there is always
            break
        lines.append(line)
    name, answer = rng.choice(lines).split(":")
    return "\n\n".join([*lines, name + ":"]), answer


def main():
    from tokenizer import Tokenizer

    args = cli.parse(__doc__, "run", "seed")
    tokenizer, rng = Tokenizer.load(args.run), random.Random(args.seed)
    lang = rng.choice(LANGUAGES)
    for prompt, answer in (needle(tokenizer, lang, rng, 200, 0.5), line_retrieval(tokenizer, lang, rng, 100)):
        print(f"{prompt}>>>{answer}\n{len(tokenizer.encode(prompt + answer))} tokens\n")


if __name__ == "__main__":
    cli.run(main)
