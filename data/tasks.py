"""Tasks over the synthetic marketplace, for tuning and for evaluation (v2 §3.1, §5.2).

The report's twelve e-commerce categories and mathematics here, its other general ones in data/general.py, all in eight languages. A task is
{"id", "task", "lang", "messages", "answer", "scorer", "choices"?, "think"?}; "think" is the reference chain of thought. Where a question is
about a text, the message is the text, a blank line, the question: this is how the baseline without the text knows what to cut. Test tasks
use products and phrasings that never occur in training.

    python -m data.tasks                        # two samples of every task and language
    python -m data.tasks --out tasks --seed 1   # tasks/train.jsonl and tasks/test.jsonl
"""

import dataclasses
import functools
import hashlib
import json
import keyword
import os
import random
import re

import cli
from data import general, market
from data.general import YES_NO, about, ask, larger, same, search, thought
from data.market import LANGUAGES, draw_product, lexicon, money, page, phrase


def lookup(kinds):
    """A task that asks for one of the product's fields, given its page."""

    def make(lang, rng, split):
        product = draw_product(rng, split)
        question, answer = question_about(product, lang, rng, split, rng.choice(kinds))
        return {"messages": about(page(product, lang, rng, split), question), "answer": answer}

    return make


def question_about(product, lang, rng, split, kind):
    """(question, answer): a field of the product."""
    return ask(lang, rng, split, kind), product.words(lang)[kind]


def classification(lang, rng, split):
    return {**lookup(("category",))(lang, rng, split), "choices": list(lexicon(lang)["categories"].values())}


def drill(pairs):
    """A chat of (question, answer) pairs; the last question is to be answered."""
    messages = [{"role": role, "content": text} for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]
    return {"messages": messages[:-1], "answer": messages[-1]["content"]}


def chat(text, pairs):
    """A drill about a text, which the first question brings along."""
    (question, answer), *others = pairs
    return drill([(f"{text}\n\n{question}", answer), *others])


def dialogue(lang, rng, split, kinds=("price", "stock", "city", "colour"), turns=2):
    """Several turns about one page, each asking for another of `kinds`."""
    product = draw_product(rng, split)
    pairs = [question_about(product, lang, rng, split, kind) for kind in rng.sample(kinds, turns)]
    return chat(page(product, lang, rng, split), pairs)


def recommendation(lang, rng, split):
    """A shop window of three products of different colours; name the one of the wanted colour."""
    products, lex = [], lexicon(lang)
    while len(products) < 3:
        product = draw_product(rng, split)
        if product.colour not in {p.colour for p in products}:
            products.append(product)
    wanted, colours = rng.choice(products), lex["colours"]
    window = "\n".join([lex["catalogue"], *("- " + lex["listing"].format(**p.words(lang)) for p in products)])
    question = ask(lang, rng, split, "recommend", colour=colours[wanted.colour])
    think = search([(f"{p.name}:", colours[p.colour]) for p in products], colours[wanted.colour], lang)
    return {"messages": about(window, question), "answer": wanted.name, "think": think}


def numerical_reasoning(lang, rng, split):
    product, n = draw_product(rng, split), rng.randint(2, 9)
    steps = market.steps_product(product.price, n)
    return {
        "messages": about(page(product, lang, rng, split), ask(lang, rng, split, "total", n=n)),
        "answer": money(product.price * n, lang),
        "scorer": "number",
        "think": lexicon(lang)["thoughts"]["total"].format(unit=money(product.price, lang), steps=steps),
    }


def matching(lang, rng, split):
    """A page and a query that half the time the product does not fit: its type or, harder, its colour alone is another."""
    product, kind = draw_product(rng, split), rng.choice(("match",))  # a choice of one, for the frozen test tasks were drawn with it
    lex, words, fits = lexicon(lang), product.words(lang), rng.random() < 0.5
    wanted = dict(words)
    if not fits:
        key = rng.choice(("type", "colour"))
        wanted[key] = rng.choice([word for word in lex[market.FIELDS[key]].values() if word != words[key]])
    think = thought([same(words[key], wanted[key], lang) for key in ("colour", "type")])
    question = ask(lang, rng, split, kind, query=lex["query"].format(**wanted))
    choices = [lex[word] for word in YES_NO]
    return {"messages": about(page(product, lang, rng, split), question), "answer": choices[not fits], "think": think, "choices": choices}


def review_understanding(lang, rng, split):
    """Sentiment of a one-sided review, or the aspect a mixed review complains about."""
    product, lex = draw_product(rng, split), lexicon(lang)
    if rng.random() < 0.5:
        polarity = rng.choice(("praise", "complaint"))
        text, _ = market.review(product, lang, rng, split, (polarity, polarity))
        kind, choices = "sentiment", [lex["positive"], lex["negative"]]
        answer = choices[polarity == "complaint"]
    else:
        polarities = rng.sample(("praise", "complaint"), 2)
        text, aspects = market.review(product, lang, rng, split, polarities)
        kind, choices = "complaint", list(lex["aspects"].values())
        answer = lex["aspects"][aspects[polarities.index("complaint")]]
    return {"messages": about(text, ask(lang, rng, split, kind)), "answer": answer, "choices": choices}


def query_rewriting(lang, rng, split):
    product = draw_product(rng, split)
    noisy = market.noisy_query(product, lang, rng, split)
    return {"messages": about(noisy, ask(lang, rng, split, "rewrite")), "answer": market.clean_query(product, lang)}


def similarity(lang, rng, split):
    """A page and a shop-window line: the same product, or one with another type, colour or price?"""
    product, lex = draw_product(rng, split), lexicon(lang)
    other, differs = product, rng.random() >= 0.5
    while differs and other == product:
        drawn, field = draw_product(rng, split), rng.choice(("type", "colour", "price"))
        other = dataclasses.replace(product, **{field: getattr(drawn, field)})
    words, others, choices = product.words(lang), other.words(lang), [lex[word] for word in YES_NO]
    think = thought([same(words[key], others[key], lang) for key in ("type", "colour", "price")])
    text = f"{page(product, lang, rng, split)}\n{lex['listing'].format(**others)}"
    messages = about(text, ask(lang, rng, split, "similar"))
    return {"messages": messages, "answer": choices[other != product], "think": think, "choices": choices}


def information_generation(lang, rng, split):
    """From a page to a title, or to a line for the shop window with the price."""
    product, kind = draw_product(rng, split), rng.choice(("headline", "advert"))
    answer = lexicon(lang)["title" if kind == "headline" else "listing"].format(**product.words(lang))
    return {"messages": about(page(product, lang, rng, split), ask(lang, rng, split, kind)), "answer": answer, "scorer": "covers"}


def questioning(lang, rng, split):
    """A page that leaves one fact out: the question a buyer has to ask."""
    lex, product = lexicon(lang), draw_product(rng, split)
    facts, missing = list(lex["ask_for"]), rng.choice(list(lex["ask_for"]))
    rng.shuffle(facts)
    given = [lex["test_facts"][f] if split == "test" else market.phrase(lex["pages"]["facts"][f], rng) for f in facts if f != missing]
    head = lex["pages"]["test"][0].split("\n")[0] if split == "test" else market.phrase(lex["pages"]["heads"], rng)
    words, questions = product.words(lang), lex["ask_for"]
    text = (head + "\n" + rng.choice(lex["pages"]["joiners"]).join(given)).format(**words)
    think = " ".join(f"{words[fact]}: {questions[fact]}" for fact in facts if fact != missing)  # what the page does answer
    messages = about(text, ask(lang, rng, split, "missing"))
    return {"messages": messages, "answer": questions[missing], "think": think, "choices": list(questions.values())}


def mathematics(lang, rng, split):
    """Sums of two-digit numbers; no pair of the test world is asked for in training (steps of thoughts may have it: 30 + 17 = 47)."""
    a, b = market.draw_sum(rng, split)
    return {
        "messages": [{"role": "user", "content": ask(lang, rng, split, "sum", a=a, b=b)}],
        "answer": str(a + b),
        "scorer": "number",
        "think": lexicon(lang)["thoughts"]["sum"].format(steps=market.steps_sum(a, b)),
    }


ECOMMERCE = {
    "product_info": lookup(("brand", "city")),
    "attribute_extraction": lookup(("colour", "material")),
    "classification": classification,
    "recommendation": recommendation,
    "numerical_reasoning": numerical_reasoning,
    "matching": matching,
    "review_understanding": review_understanding,
    "query_rewriting": query_rewriting,
    "dialogue": dialogue,
    "similarity": similarity,
    "information_generation": information_generation,
    "questioning": questioning,
}
TASKS = {**ECOMMERCE, "mathematics": mathematics, **general.TASKS}


def tasks(split, seed, per_task):
    """`per_task` tasks for each (task, language), as a list. Deterministic in (split, seed); test uses its own stream."""
    made = []
    for name, make in TASKS.items():
        for lang in LANGUAGES:
            rng = random.Random(f"{split}-{seed}-{name}-{lang}")
            for i in range(per_task):
                task = {"id": f"{split}-{name}-{lang}-{i}", "task": name, "lang": lang, "scorer": "exact"}
                made.append({**task, **make(lang, rng, split)})
    return made


def fingerprint(made):
    """16 hexadecimal digits that stand for a list of tasks: two accuracies compare only where these are equal. Reference thoughts do not
    count, they are neither shown nor scored."""
    asked = [{key: value for key, value in task.items() if key != "think"} for task in made]
    return hashlib.sha256(json.dumps(asked, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:16]


def ledger(lang, rng, split):
    """Lines that say where parcels lie, perhaps pages among them; each question names one parcel, the answer is its city."""
    lines = market.ledger_lines(lang, rng, rng.randint(2, 8))
    pages = [page(draw_product(rng, split), lang, rng, split) for _ in range(rng.randint(0, 2))]
    pairs = [line.split(": ") for line in rng.sample(lines, min(4, len(lines)))]
    return chat("\n\n".join(rng.sample(lines + pages, len(lines + pages))), [(f"{parcel}:", city) for parcel, city in pairs])


# A skill is learnt from many short trials in one conversation: what copies, chooses or compares is hardly seen in a page with one question


def echo(lang, rng, split, turns=3):
    """Made-up words, to be said again: what cannot be known has to be copied."""

    def words():
        return " ".join((str.capitalize if rng.random() < 0.5 else str)(market.made_up(rng)) for _ in range(rng.randint(2, 8)))

    return drill([(f"» {text}", text) for text in (words() for _ in range(turns))])


@functools.cache
def known_words(form=".+"):
    """Every word of the training world, of all languages, that a regular expression describes; sorted."""

    def texts(part):
        if isinstance(part, dict):
            part = [inner for key, inner in part.items() if not key.startswith("test")]
        if isinstance(part, list):
            return [text for inner in part for text in texts(inner)]
        return [part] if isinstance(part, str) else []

    words = {word for lang in LANGUAGES for text in texts(lexicon(lang)) for word in re.split(r"[\s\[\]{}|+]+", text)}
    return sorted(word for word in words if re.fullmatch(form, word))


def glued(words, rng):
    """The beginning of a word and the end of another: what a tokenizer cuts into pieces that hardly occur otherwise."""
    one, other = rng.choices(words, k=2)
    return one[: rng.randint(0, len(one))] + other[rng.randrange(len(other)) :]


def recital(lang, rng, split, turns=3):
    """Words of all languages, whole and glued, to be said again: a token that is never an answer in training cannot be one later.

    Between quotation marks and behind other commas a tokenizer cuts the same word differently; this, too, has to be learnt."""
    words, pairs = known_words(), []
    for _ in range(turns):
        drawn = [rng.choice(words) if rng.random() < 0.5 else glued(words, rng) for _ in range(rng.randint(2, 8))]
        drawn = [word.capitalize() if rng.random() < 0.3 else word for word in drawn]
        quotes, joiner = rng.choice(("{}", "{}", "“{}”", "「{}」", '"{}"', "{},", "{}:")), rng.choice((" ", " ", "，", ", "))
        pairs.append((f"»{joiner}{' '.join(quotes.replace('{}', word) for word in drawn)}", joiner.join(drawn)))
    return drill(pairs)


def functions(lang, rng, split, turns=5):
    """Small Python functions named by words, whole and glued: the name is copied, not one of a list."""
    formulas, words, names = list(lexicon(lang)["formulas"]), known_words("[a-z]{3,}"), []
    while len(names) < turns:
        name = rng.choice(words) if rng.random() < 0.5 else glued(words, rng)
        if len(name) > 2 and not keyword.iskeyword(name) and name not in general.FUNCTIONS["test"]:
            names.append(name)
    return drill([general.function_question(rng.choice(formulas), name, lang, rng, split) for name in names])


def asked_aloud(steps):
    """A drill of the questions a thought asks itself, two at a time; the answer says them again with their verdicts, as a thought does."""
    pairs = [steps[i : i + 2] for i in range(0, len(steps), 2)]
    return drill([(" ".join(question for question, _ in pair), thought(pair)) for pair in pairs])


def word_pairs(lang, rng, split, n=8):
    """Two colours, product types or names: are they the same?"""
    lex, steps = lexicon(lang), []
    for _ in range(n):
        kind = rng.choice(("colours", "types", "names"))
        known = sorted({draw_product(rng, split).name for _ in range(4)}) if kind == "names" else list(lex[kind].values())
        one = rng.choice(known)
        other = one if rng.random() < 0.5 else rng.choice([word for word in known if word != one])
        steps.append(same(one, other, lang))
    return asked_aloud(steps)


def number_pairs(lang, rng, split, n=8):
    """Two prices or two numbers: is the first the larger, or are they the same?"""
    steps = []
    for _ in range(n):
        (a, b), dress = rng.sample(range(1, 100), 2), rng.choice((str, functools.partial(money, lang=lang)))
        if rng.random() < 0.5:
            steps.append(larger(a, b, lang, dress))
        else:
            steps.append(same(dress(a), dress(rng.choice((a, b))), lang))
    return asked_aloud(steps)


def differences(lang, rng, split, turns=6):
    """Two digits minus one, as a voucher takes it off; the steps are the answer."""
    pairs = [(rng.randint(11, 99), rng.randint(2, 9)) for _ in range(turns)]
    return drill([(f"{a} - {b}", market.steps_difference(a, b)) for a, b in pairs])


def orders(lang, rng, split, turns=6):
    """What the thought of an order reads, one thing at a time: which of two brands is the dearer, which end a question asks for."""
    pairs = []
    for _ in range(turns):
        (x, y), end = rng.sample(market.BRANDS, 2), rng.choice(list(general.ENDS))
        line = phrase(lexicon(lang)["compare"][split], rng).format(x=x, y=y), f"{x} > {y}"
        pairs.append(rng.choice((line, (ask(lang, rng, split, end), general.ENDS[end]))))
    return drill(pairs)


def shelf(lang, rng, split, turns=5):
    """Two pages and many questions: one for the cheaper product, the others name the product, which may be a third, unknown one."""
    products, text = general.shelf(lang, rng, split)
    pairs = [general.named_question(products, rng.randint(0, 2), lang, rng, split) for _ in range(turns - 1)]
    pairs.insert(rng.randrange(turns), general.cheaper_question(products, lang, rng, split))
    return chat(text, pairs)


CONVERSATIONS = {  # training only: one reading of a text serves many answers
    "page": functools.partial(dialogue, kinds=market.ASKED, turns=len(market.ASKED)),
    "ledger": ledger,
    "echo": echo,
    "recital": recital,
    "functions": functions,
    "word_pairs": word_pairs,
    "number_pairs": number_pairs,
    "differences": differences,
    "orders": orders,
    "shelf": shelf,
}
# how often each is drawn for the training set, relative to a mixture's sum; a page with seven questions is ten times as long as a fact.
# What is found in pages comes first, and copying; sft2 adds sums and orders with their thoughts
FIRST = {
    "page": 15, "echo": 8, "review_understanding": 6, "query_rewriting": 10, "matching": 2, "classification": 1,
    "product_info": 1, "attribute_extraction": 1, "dialogue": 2, "mathematics": 6, "numerical_reasoning": 7,
    "similarity": 2, "information_generation": 4, "questioning": 4, "safety": 3, "knowledge": 5, "understanding": 3,
    "reasoning": 4, "creative": 4, "coding": 4, "function_call": 5, "retrieval": 3, "role_play": 3, "platform": 3,
}  # fmt: skip
LATER = {
    **FIRST, "page": 10, "query_rewriting": 6, "mathematics": 9, "numerical_reasoning": 11, "matching": 1, "similarity": 1,
    "questioning": 1, "retrieval": 2, "platform": 2, "recommendation": 2,
}  # fmt: skip
# Comparing takes a long training. Between the two it has what thoughts compare with, alone, since it is not learnt beside other things,
PAIRS = {"word_pairs": 55, "number_pairs": 45}
# then all that has a thought, always with it; sft2 keeps that up
DRILLS = {
    "recital": 8, "functions": 2, "word_pairs": 8, "number_pairs": 10, "matching": 12, "similarity": 12, "recommendation": 10,
    "retrieval": 12, "questioning": 12, "platform": 6, "mathematics": 6, "numerical_reasoning": 6, "reasoning": 6, "differences": 4,
    "orders": 6,
}  # fmt: skip
AFTER_DRILLS = {
    **FIRST, "page": 10, "ledger": 3, "query_rewriting": 6, "matching": 4, "similarity": 4, "questioning": 5, "recommendation": 4,
    "word_pairs": 3, "number_pairs": 3, "echo": 2, "recital": 8, "functions": 2, "coding": 3, "shelf": 6, "retrieval": 5, "safety": 8,
    "knowledge": 10, "reasoning": 6, "differences": 3, "orders": 4,
}  # fmt: skip


def training(seed, per_language, shares=LATER, phrasings=None):
    """The training set: `per_language` tasks and longer conversations in these shares. Deterministic in the arguments.

    phrasings: how many ways of putting each question and each fact are heard at most; infinite: all, see market.phrase.
    """
    makers, made = {**TASKS, **CONVERSATIONS}, []
    for lang in LANGUAGES:
        rng = random.Random(f"training-{seed}-{lang}")
        rng.phrasings = phrasings
        for i, name in enumerate(rng.choices(list(shares), shares.values(), k=per_language)):
            made.append({"id": f"training-{lang}-{i}", "task": name, "lang": lang, **makers[name](lang, rng, "train")})
    return made


def main():
    args = cli.parse(__doc__, "seed", out=dict(help="folder to write train.jsonl and test.jsonl to"))
    if args.out is None:
        for task in tasks("train", args.seed, 2):
            print(json.dumps(task, ensure_ascii=False))
        return
    for split, made in (("train", training(args.seed, 2000)), ("test", tasks("test", args.seed, 10))):
        path = os.path.join(args.out, f"{split}.jsonl")
        cli.write_jsonl(path, made)
        print(f"{path}: {len(made)} tasks")


if __name__ == "__main__":
    cli.run(main)
