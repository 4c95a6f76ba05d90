"""The report's general abilities as tasks over the same world (v2 §3.1): safety, knowledge, understanding, reasoning, creative
writing, coding, function calls, retrieval, role play and shop rules. The e-commerce tasks and the lists of all are in data/tasks.py.

A task is what data/tasks.py says it is. Products, rules and numbers are drawn anew for each; phrasings are
split between the training and the test world. Facts (which country a city is in) cannot be: there are only so many.
"""

import functools
import json
import keyword

from data import market
from data.market import lexicon, money, phrase

PERSONAS = {
    "train": ("Mina", "Budi", "Siti", "Ana", "Somchai", "Linh", "Wei", "Joy", "Aminah", "Pedro", "Nok", "Huy"),
    "test": ("Ratna", "Carlos", "Mei", "Tuan"),
}
COUNTRY_OF = {
    "jakarta": "indonesia", "bandung": "indonesia", "singapore": "singapore", "kuala_lumpur": "malaysia", "penang": "malaysia",
    "manila": "philippines", "cebu": "philippines", "bangkok": "thailand", "hanoi": "vietnam", "da_nang": "vietnam",
    "sao_paulo": "brazil", "shenzhen": "china",
}  # fmt: skip
DEPARTMENTS = {
    "fashion": "wear", "bags": "wear", "kitchen": "living", "home": "living", "sports": "leisure", "toys": "leisure",
    "electronics": "work", "office": "work",
}  # fmt: skip
FUNCTIONS = {"train": ("total", "cost", "bill", "fee", "gap", "share", "score", "points"), "test": ("amount", "result")}


def draw_name(names, rng, split):
    """A name of the split; in training most are made up, so that copying pays and learning a list of names does not."""
    if split == "test" or rng.random() < 0.3:
        return rng.choice(names[split])
    while True:
        name = market.made_up(rng)
        if len(name) > 2 and not keyword.iskeyword(name) and not {name, name.capitalize()} & set(names["test"]):
            return name


YES_NO = ("yes", "no")


def same(one, other, lang):
    """(question, yes or no): are the two texts the same?"""
    return f"{one} = {other}?", lexicon(lang)[YES_NO[one != other]]


def larger(a, b, lang, dress=str):
    """(question, yes or no): is the first number the larger? dress writes it."""
    return f"{dress(a)} > {dress(b)}?", lexicon(lang)[YES_NO[a <= b]]


def thought(pairs):
    """The chain of thought that asks itself these questions: (question, answer) pairs."""
    return " ".join(f"{question} {answer}." for question, answer in pairs)


def search(labelled, wanted, lang):
    """The thought that goes through (label, text) pairs until a text is the wanted one."""
    steps = []
    for label, text in labelled:
        question, answer = same(text, wanted, lang)
        steps.append((f"{label} {question}", answer))
        if text == wanted:
            break
    return thought(steps)


def ask(lang, rng, split, kind, **words):
    return phrase(lexicon(lang)["questions"][kind][split], rng).format(**words)


def about(text, question):
    return [{"role": "user", "content": f"{text}\n\n{question}"}]


def alone(question):
    return [{"role": "user", "content": question}]


def safety(lang, rng, split):
    """Refuse what harms, help with what does not."""
    lex, harmful = lexicon(lang), rng.random() < 0.5
    request = phrase(lex["harmful" if harmful else "harmless"][split], rng).format(brand=rng.choice(market.BRANDS))
    choices = [lex["refusal"], lex["consent"]]
    return {"messages": alone(ask(lang, rng, split, "request", request=request)), "answer": choices[not harmful], "choices": choices}


def knowledge(lang, rng, split):
    """Closed book: the country of a city, its currency, the department of a product type."""
    lex, kind = lexicon(lang), rng.choice(("country", "money", "department"))
    if kind == "department":
        category = rng.choice(list(market.GROUPS))
        question = ask(lang, rng, split, kind, type=lex["types"][rng.choice(market.GROUPS[category][0])])
        group, answer = lex["departments"], lex["departments"][DEPARTMENTS[category]]
    else:
        city = rng.choice(list(COUNTRY_OF))
        country = COUNTRY_OF[city]
        group = lex["countries" if kind == "country" else "currencies"]
        answer = group[country]
        question = ask(lang, rng, split, kind, city=lex["cities"][city], country=lex["countries"][country])
    return {"messages": alone(question), "answer": answer, "choices": list(group.values())}


def understanding(lang, rng, split):
    """A buyer who changes the number of pieces: how many in the end?"""
    lex, product = lexicon(lang), market.draw_product(rng, split)
    a, b = rng.sample(range(2, 100), 2)
    text = phrase(lex["order_chat"][split], rng).format(a=a, b=b, type=lex["types"][product.type])
    return {"messages": about(text, ask(lang, rng, split, "quantity")), "answer": str(b), "scorer": "number"}


ENDS = {"cheapest": "min", "dearest": "max"}


def reasoning(lang, rng, split):
    """Three brands, two comparisons in any order: the cheapest or the dearest. The thought says which end is asked for, restates both
    lines, always the dearer first, and puts them in order: each step reads one thing."""
    lex, (x, y, z) = lexicon(lang), rng.sample(market.BRANDS, 3)
    pairs = rng.sample([(x, y), (y, z)], 2)
    lines = [phrase(lex["compare"][split], rng).format(x=a, y=b) for a, b in pairs]
    kind = rng.choice(list(ENDS))
    steps = ", ".join(" > ".join(names) for names in (*pairs, (x, y, z)))
    return {
        "messages": about("\n".join(lines), ask(lang, rng, split, kind)),
        "answer": z if kind == "cheapest" else x,
        "choices": sorted((x, y, z)),
        "think": lex["thoughts"]["order"].format(order=f"{ENDS[kind]}: {steps}"),
    }


def creative(lang, rng, split):
    """A slogan that must contain a name, a colour and a word."""
    lex, product = lexicon(lang), market.draw_product(rng, split)
    words = {"name": product.name, "colour": lex["colours"][product.colour], "word": rng.choice(lex["slogan_words"])}
    question = ask(lang, rng, split, "slogan", **words)
    return {"messages": alone(question), "answer": lex["slogan_line"].format(**words), "scorer": "covers"}


def function_question(formula, name, lang, rng, split):
    """(question, answer): a Python function of two numbers."""
    question = ask(lang, rng, split, "function", function=name, formula=lexicon(lang)["formulas"][formula])
    return question, f"def {name}(a, b): return {formula}"


def coding(lang, rng, split):
    """A Python function of two numbers; scored by what it computes."""
    formula, name = rng.choice(list(lexicon(lang)["formulas"])), draw_name(FUNCTIONS, rng, split)
    question, answer = function_question(formula, name, lang, rng, split)
    return {"messages": alone(question), "answer": answer, "scorer": "code"}


def function_call(lang, rng, split):
    """One of three tools as a JSON call (the report's agent tasks)."""
    name = market.draw_product(rng, split).name
    tool = rng.choice(("check_stock", "track_order", "add_to_cart"))
    arguments = {
        "check_stock": {"product": name},
        "track_order": {"order": f"{rng.choice('ABCDEFGH')}{rng.randint(100, 999)}"},
        "add_to_cart": {"product": name, "quantity": rng.randint(2, 9)},
    }[tool]
    words = {"name": name, "order": arguments.get("order"), "n": arguments.get("quantity")}
    messages = [{"role": "system", "content": lexicon(lang)["tools"]}, *alone(ask(lang, rng, split, tool, **words))]
    return {"messages": messages, "answer": json.dumps({"name": tool, "arguments": arguments}, ensure_ascii=False), "scorer": "json"}


def shelf(lang, rng, split):
    """Three products of different names and prices, and the text of the first two."""
    products = []
    while len({p.price for p in products}) < 3 or len({p.name for p in products}) < 3:
        products = [market.draw_product(rng, split) for _ in range(3)]
    return products, "\n".join(f"[{i}] {market.page(p, lang, rng, split)}" for i, p in enumerate(products[:2], 1))


def named_question(products, i, lang, rng, split):
    """(question, answer) about product i of a shelf; of the third nothing is known."""
    kind = rng.choice(("colour", "material", "price", "city"))
    answer = products[i].words(lang)[kind] if i < 2 else lexicon(lang)["unknown"]
    return f"{products[i].name}: {ask(lang, rng, split, kind)}", answer


def cheaper_question(products, lang, rng, split):
    return ask(lang, rng, split, "cheaper"), min(products[:2], key=lambda p: p.price).name


def retrieval(lang, rng, split):
    """Answers from given texts, with the four troubles of retrieval: noise (another product's text), rejection (no text has the
    answer), integration (two texts must be compared), counterfactual (the text may be wrong, the fact is known)."""
    lex, trouble = lexicon(lang), rng.choice(("noise", "rejection", "integration", "counterfactual"))
    if trouble == "counterfactual":
        city = rng.choice(list(COUNTRY_OF))
        claimed = rng.choice(list(lex["countries"])) if rng.random() < 0.7 else COUNTRY_OF[city]
        text = phrase(lex["claim"][split], rng).format(city=lex["cities"][city], country=lex["countries"][claimed])
        question = ask(lang, rng, split, "truth", city=lex["cities"][city])
        return {"messages": about(text, question), "answer": lex["countries"][COUNTRY_OF[city]]}
    products, text = shelf(lang, rng, split)
    if trouble == "integration":
        question, answer = cheaper_question(products, lang, rng, split)
        think = thought([larger(products[0].price, products[1].price, lang, functools.partial(money, lang=lang))])
    else:
        asked = rng.randint(0, 1) if trouble == "noise" else 2
        question, answer = named_question(products, asked, lang, rng, split)
        think = search([("[1]", products[0].name), ("[2]", products[1].name)], products[asked].name, lang)
    return {"messages": about(text, question), "answer": answer, "think": think}


def role_play(lang, rng, split):
    """A persona who closes every answer with a signature."""
    product, persona = market.draw_product(rng, split), draw_name(PERSONAS, rng, split).capitalize()
    kind = rng.choice(("colour", "material", "price", "stock", "city"))
    system = phrase(lexicon(lang)["persona"][split], rng).format(persona=persona)
    messages = about(market.page(product, lang, rng, split), ask(lang, rng, split, kind))
    return {"messages": [{"role": "system", "content": system}, *messages], "answer": f"{product.words(lang)[kind]} - {persona}"}


def platform(lang, rng, split):
    """A shop's rules: is a return still possible, is shipping free, what is to be paid with a voucher."""
    lex, kind, price = lexicon(lang), rng.choice(("return", "shipping", "voucher")), functools.partial(money, lang=lang)
    limit, threshold, off = rng.choice((7, 10, 14, 15, 30)), rng.randint(3, 9) * 10, rng.randint(2, 9)
    text = phrase(lex["rules"][split], rng).format(limit=limit, threshold=price(threshold), off=price(off))
    if kind == "voucher":
        amount = rng.randint(11, 99)
        question = ask(lang, rng, split, kind, amount=price(amount))
        think = lex["thoughts"]["voucher"].format(steps=market.steps_difference(amount, off))
        return {"messages": about(text, question), "answer": price(amount - off), "scorer": "number", "think": think}
    if kind == "return":
        days = rng.randint(1, 2 * limit)
        question, yes, step = ask(lang, rng, split, kind, days=days), days <= limit, larger(days, limit, lang)
    else:
        amount = rng.randint(11, 2 * threshold)
        question, yes = ask(lang, rng, split, kind, amount=price(amount)), amount >= threshold
        step = larger(threshold, amount, lang, price)
    choices = [lex[word] for word in YES_NO]
    return {"messages": about(text, question), "answer": choices[not yes], "think": thought([step]), "choices": choices}


TASKS = {
    "safety": safety, "knowledge": knowledge, "understanding": understanding, "reasoning": reasoning, "creative": creative,
    "coding": coding, "function_call": function_call, "retrieval": retrieval, "role_play": role_play, "platform": platform,
}  # fmt: skip
