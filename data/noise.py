"""A corpus with planted faults and their labels, so that the chain's precision and recall can be counted.

Clean marketplace documents, and among them what crawls bring along. Every document says in "fault" what is wrong with it,
None for clean ones. Of two copies the first is clean and the later one at fault.

    python -m data.noise --out crawl        # crawl/<lang>.jsonl, ready for python -m data.chain
"""

import os
import random

import cli
from data import market

FAULTS = (
    "exact duplicate", "near duplicate", "wrong language", "two languages", "spam", "broken encoding", "too short",
    "symbols", "boilerplate", "minified code", "generated code",
)  # fmt: skip


def _clean(lang, rng):
    """A clean document of some length: a shop's catalogue, questions with answers, chats, or code."""
    kind = rng.choice(("shop", "faq", "chat", "code"))
    if kind == "shop":
        return {"text": market.shop_document(lang, rng, "train", rng.randint(3, 6)), "kind": "prose"}
    if kind == "code":
        return {"text": "\n\n".join(market.code_document(rng) for _ in range(3)), "kind": "code"}
    if kind == "faq":
        return {"text": "\n".join(market.document(lang, rng, "train", kind) for _ in range(3)), "kind": "prose"}
    chats = rng.sample(market.lexicon(lang)["chats"], 3)  # three of a kind would repeat whole lines, as spam does
    return {"text": "\n".join(chat.format(**market.draw_product(rng, "train").words(lang)) for chat in chats), "kind": "prose"}


def _prose(lang, rng):
    return market.shop_document(lang, rng, "train", rng.randint(3, 6))


def _planted(fault, lang, rng, before):
    """A document with a fault; `before` holds clean prose of the same language."""
    lex, other = market.lexicon(lang), rng.choice([other for other in market.LANGUAGES if {other, lang} != {"id", "ms"} and other != lang])
    product = market.draw_product(rng, "train")
    text, kind = _prose(lang, rng), "prose"
    if fault == "exact duplicate":
        text = rng.choice(before)
    elif fault == "near duplicate":  # one more line, as when a page is crawled on another day
        text = rng.choice(before) + "\n" + str(rng.randint(1000, 9999))
    elif fault == "wrong language":
        text = _prose(other, rng)
    elif fault == "two languages":
        text = "\n".join(market.document(language, rng, "train", "review") for language in (lang, other) * 3)
    elif fault == "spam":
        text = "\n".join(market.phrase(lex["spam"], rng).format(**product.words(lang)) for _ in range(3))
    elif fault == "broken encoding":  # each byte of the UTF-8 became a character; plain ASCII would survive that
        text = (text + " é–’ ö " * 20).encode().decode("latin-1")
    elif fault == "too short":
        text = lex["types"][product.type]
    elif fault == "symbols":
        text = " ".join(f"{rng.randint(0, 999)} {rng.choice('|*#=~')}" for _ in range(60))
    elif fault == "boilerplate":
        text = "\n".join([*rng.sample(lex["boilerplate"], 2), text, *rng.sample(lex["boilerplate"], 2)])
    else:
        kind = "code"
        text = "".join(f"var a{i}={rng.random()};f(a{i});" for i in range(60)) if fault == "minified code" else ""
        text = text or "# auto-generated, do not edit\n" + market.code_document(rng)
    return {"text": text, "kind": kind}


def documents(seed, per_language=400, share=0.4):
    """Yield {"id", "text", "lang", "kind", "fault"}; `share` of them have a fault, each fault as often. Deterministic in the seed."""
    rng = random.Random(f"noise-{seed}")
    for lang in market.LANGUAGES:
        before = []
        for i in range(per_language):
            fault = rng.choice(FAULTS) if before and rng.random() < share else None
            made = _planted(fault, lang, rng, before) if fault else _clean(lang, rng)
            if fault is None and made["kind"] == "prose":
                before.append(made["text"])
            yield {"id": f"{lang}-{i}", **made, "lang": lang, "fault": fault}


def main():
    args = cli.parse(__doc__, "seed", out=dict(required=True, help="folder to write <lang>.jsonl to"))
    made = list(documents(args.seed))
    for lang in market.LANGUAGES:
        cli.write_jsonl(os.path.join(args.out, f"{lang}.jsonl"), (document for document in made if document["lang"] == lang))
    print(f"{args.out}: {len(made)} documents, {sum(d['fault'] is not None for d in made)} with a planted fault")


if __name__ == "__main__":
    cli.run(main)
