"""Preference pairs over the marketplace, for the reward model, DPO and OTPO (v2 §4, v3 §4): {id, messages, chosen, rejected, source}.

"decisive" pairs are two lines about a product that differ in one word or number only (colour, type, price, a zero more), so that
one or two tokens decide; "answer" pairs are a right and a wrong answer to a task; "format" pairs answer rightly, but
one of them drowns the answer in what nobody asked. Deterministic in the seed; products and phrasings are split as in data/tasks.py.

    python -m data.preferences                     # a pair of each source in each language
    python -m data.preferences --out pairs         # pairs/train.jsonl, pairs/test.jsonl
"""

import dataclasses
import json
import os
import random

import cli
from data import market
from data.general import about, ask
from data.market import LANGUAGES, draw_product, lexicon, page
from data.scorers import SCORERS
from data.tasks import TASKS, question_about

DECISIVE = ("colour", "type", "price", "unit")


def decisive(lang, rng, split):
    """The shop-window line of a page; the rejected one has one thing wrong: a word, the price, or ten times the price."""
    product, field = draw_product(rng, split), rng.choice(DECISIVE)
    if field == "unit":
        wrong = dataclasses.replace(product, price=10 * product.price)
    else:
        other = draw_product(rng, split)
        while getattr(other, field) == getattr(product, field):
            other = draw_product(rng, split)
        wrong = dataclasses.replace(product, **{field: getattr(other, field)})
    line = lexicon(lang)["listing"]
    return {
        "messages": about(page(product, lang, rng, split), ask(lang, rng, split, "advert")),
        "chosen": line.format(**product.words(lang)),
        "rejected": line.format(**wrong.words(lang)),
    }


def answer(lang, rng, split):
    """A task's reference and another task's answer of the same kind that its scorer refuses."""
    make = TASKS[rng.choice(list(TASKS))]
    task = make(lang, rng, split)
    others = [choice for choice in task.get("choices", ()) if choice != task["answer"]]
    rejected = rng.choice(others) if others else task["answer"]
    while SCORERS[task.get("scorer", "exact")](rejected, task["answer"]):
        rejected = make(lang, rng, split)["answer"]
    return {"messages": task["messages"], "chosen": task["answer"], "rejected": rejected}


def form(lang, rng, split):
    """A short answer before one that repeats the page around it."""
    product = draw_product(rng, split)
    text = page(product, lang, rng, split)
    question, short = question_about(product, lang, rng, split, rng.choice(market.ASKED))
    return {"messages": about(text, question), "chosen": short, "rejected": f"{text}\n{short}"}


SOURCES = {"decisive": decisive, "answer": answer, "format": form}


def preferences(split, seed, per_language):
    """`per_language` pairs a language, sources in turn, as a list."""
    made = []
    for lang in LANGUAGES:
        rng = random.Random(f"preferences-{split}-{seed}-{lang}")
        for i in range(per_language):
            source = list(SOURCES)[i % len(SOURCES)]
            made.append({"id": f"pair-{split}-{lang}-{i}", "lang": lang, **SOURCES[source](lang, rng, split), "source": source})
    return made


def main():
    args = cli.parse(__doc__, "seed", out=dict(help="folder to write train.jsonl and test.jsonl to"))
    if args.out is None:
        for pair in preferences("train", args.seed, len(SOURCES)):
            print(json.dumps(pair, ensure_ascii=False))
        return
    for split, per_language in (("train", 1500), ("test", 60)):
        path = os.path.join(args.out, f"{split}.jsonl")
        cli.write_jsonl(path, preferences(split, args.seed, per_language))
        print(f"{path}: {8 * per_language} pairs")


if __name__ == "__main__":
    cli.run(main)
