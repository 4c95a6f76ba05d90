"""The embedded default corpus: a synthetic South-East-Asian marketplace in eight languages.

Products are invented (brand, series, attributes, price, stock); what is said about them comes from hand-written lexicons and templates, one
file per language in data/lexicon/. Everything is a pure function of a seed. A product belongs to the training or the test world by a hash
of its name, and page, review and question templates are split the same way, so no held-out product or phrasing is ever trained on. Words
(colours, cities, praise) are shared by both worlds.

    python -m data.market     # prints one product page, review and chat per language
"""

import functools
import json
import math
import os
import random
import re
import zlib
from dataclasses import dataclass

import cli

LANGUAGES = ("en", "zh", "id", "ms", "pt", "tl", "th", "vi")
BRANDS = (
    "Velora", "Kintas", "Mandro", "Zefani", "Orbita", "Lumika", "Tasaro", "Nivela", "Bornea", "Calyra",
    "Dorani", "Esmara", "Fentiq", "Garuna", "Halimo", "Ikarva", "Jativo", "Koriva", "Lantik", "Merapo",
    "Nalani", "Pakuan", "Quenti", "Ravilo", "Sungka", "Timora", "Undara", "Vinaco", "Wikara", "Yamito",
)  # fmt: skip
GROUPS = {  # category -> (product types, materials they come in)
    "fashion": (("shirt", "jacket", "hat", "socks"), ("cotton", "polyester", "wool", "bamboo")),
    "bags": (("backpack", "wallet", "sandals", "sneakers"), ("leather", "nylon", "polyester", "rubber")),
    "electronics": (("headphones", "speaker", "charger", "keyboard"), ("plastic", "aluminium", "steel", "silicone")),
    "kitchen": (("pan", "bottle", "knife", "lunchbox"), ("steel", "glass", "aluminium", "bamboo")),
    "home": (("chair", "lamp", "pillow", "table"), ("wood", "bamboo", "cotton", "steel")),
    "sports": (("mat", "ball", "racket", "helmet"), ("rubber", "nylon", "plastic", "silicone")),
    "toys": (("doll", "puzzle", "car", "blocks"), ("wood", "plastic", "cotton", "rubber")),
    "office": (("notebook", "pen", "case", "ruler"), ("leather", "plastic", "wood", "aluminium")),
}


@functools.cache
def lexicon(lang):
    """The words and templates of one language (data/lexicon/<lang>.json)."""
    path = os.path.join(os.path.dirname(__file__), "lexicon", f"{lang}.json")
    with open(path, encoding="utf-8") as file:
        return json.load(file)


@dataclass(frozen=True)
class Product:
    """One product; all fields but brand and series are keys into the lexicons or numbers."""

    brand: str
    series: str
    category: str
    type: str
    colour: str
    material: str
    city: str
    price: int  # 11..99 price units; the language's scale turns them into money
    stock: int

    @property
    def name(self):
        return f"{self.brand} {self.series}"

    @property
    def split(self):
        return "test" if zlib.crc32(self.name.encode()) % 10 == 0 else "train"

    def words(self, lang):
        """Placeholder -> text in `lang`, for the templates."""
        lex = lexicon(lang)
        named = {key: lex[group][getattr(self, key)] for key, group in FIELDS.items()}
        named.update(brand=self.brand, name=self.name, stock=str(self.stock), price=money(self.price, lang))
        named["title"] = lex["title"].format(**named)
        return named


ASKED = ("brand", "city", "colour", "material", "category", "stock", "price")  # what is asked about a page
FIELDS = {"category": "categories", "type": "types", "colour": "colours", "material": "materials", "city": "cities"}


def money(units, lang):
    """Price units in the language's currency, e.g. 45 -> 'Rp45.000'."""
    lex = lexicon(lang)
    return lex["currency"].format(f"{units * lex['scale']:,}".replace(",", lex["thousands"]))


def product_named(brand, series):
    """The product of that name: always the same one."""
    rng = random.Random(f"{brand} {series}")
    category = rng.choice(list(GROUPS))
    types, materials = GROUPS[category]
    en = lexicon("en")
    return Product(
        brand, series, category, rng.choice(types), rng.choice(list(en["colours"])), rng.choice(materials),
        rng.choice(list(en["cities"])), rng.randint(11, 99), rng.randint(2, 99),
    )  # fmt: skip


def draw_product(rng, split):
    """A random product of the training or the test world."""
    while True:
        series = f"{rng.choice('ABCDEFGHJKLMNPQRSTUVWXYZ')}{rng.randint(1, 99)}"
        product = product_named(rng.choice(BRANDS), series)
        if product.split == split:
            return product


def phrase(templates, rng):
    """One phrasing of the templates; [a|b|] in a template stands for a, b or nothing, also nested.

    What stands behind a "+" is for long trainings: an rng whose attribute `phrasings` is infinite knows it, too. Where that is a number,
    the rng knows the first so many templates only, or the first quarter where that is more.
    """
    limit, first = getattr(rng, "phrasings", None), templates[: templates.index("+")] if "+" in templates else templates
    if limit == math.inf:
        first = [template for template in templates if template != "+"]
    elif limit is not None:
        first = first[: max(len(first) // 4, limit)]
    template = rng.choice(first)
    while "[" in template:  # innermost first
        template = re.sub(r"\[([^\[\]]*)\]", lambda choice: rng.choice(choice[1].split("|")), template)
    return re.sub(" +", " ", template).strip(" ")


def page(product, lang, rng, split):
    """A product page. Training pages are a head and the facts in any order; test pages have templates of their own."""
    pages = lexicon(lang)["pages"]
    if split == "test":
        template = phrase(pages["test"], rng)
    else:
        facts = [phrase(phrasings, rng) for phrasings in pages["facts"].values()]
        rng.shuffle(facts)
        template = phrase(pages["heads"], rng) + "\n" + rng.choice(pages["joiners"]).join(facts)
    return template.format(**product.words(lang))


def review(product, lang, rng, split, polarities):
    """A review text with two remarks of the given polarities ("praise", "complaint"), and their aspects."""
    lex = lexicon(lang)
    aspects = rng.sample(list(lex["aspects"]), 2)
    remarks = [rng.choice(lex[polarity][aspect]) for polarity, aspect in zip(polarities, aspects, strict=True)]
    template = phrase(lex["reviews"][split], rng)
    return template.format(first=remarks[0], second=remarks[1], **product.words(lang)), aspects


def noisy_query(product, lang, rng, split):
    """What a hurried buyer types: abbreviations, slang, fillers."""
    lex = lexicon(lang)
    slang = lex["slang"]
    return phrase(lex["noisy_query"][split], rng).format(colour=slang[product.colour], type=slang[product.type])


def clean_query(product, lang):
    return lexicon(lang)["query"].format(**product.words(lang))


def steps_sum(a, b):
    """Addition place by place, as a chain of thought."""
    ones, tens = a % 10 + b % 10, a - a % 10 + b - b % 10
    return f"{a % 10} + {b % 10} = {ones}, {a - a % 10} + {b - b % 10} = {tens}, {tens} + {ones} = {a + b}"


def steps_difference(a, b):
    """Two digits minus one, the ones first: a ten is borrowed where they do not suffice."""
    ones = a % 10 + 10 * (a % 10 < b)
    return f"{a} - {b} = {a - ones} + {ones} - {b} = {a - ones} + {ones - b} = {a - b}"


def steps_product(a, n):
    """Two-digit times one-digit, place by place."""
    tens, ones = a - a % 10, a % 10
    return f"{tens} × {n} = {tens * n}, {ones} × {n} = {ones * n}, {tens * n} + {ones * n} = {a * n}"


def draw_sum(rng, split):
    """Two numbers of two digits. The test world has the pairs of a tenth of all hashes, training those of which neither order is such."""

    def held_out(a, b):
        return zlib.crc32(f"{a}+{b}".encode()) % 10 == 0

    while True:
        a, b = rng.randint(11, 99), rng.randint(11, 99)
        if held_out(a, b) if split == "test" else not (held_out(a, b) or held_out(b, a)):
            return a, b


def maths_document(rng, split):
    lines = []
    for _ in range(4):
        if rng.random() < 0.5:
            a, b = draw_sum(rng, split)
            lines.append(f"{a} + {b}: {steps_sum(a, b)}")
        else:
            a, n = rng.randint(11, 99), rng.randint(2, 9)
            lines.append(f"{a} × {n}: {steps_product(a, n)}")
    return "\n".join(lines)


def code_document(rng):
    name, price, n = rng.choice(["total", "cost", "fee", "bill"]), rng.randint(11, 99), rng.randint(2, 9)
    return f"def {name}(price, pieces):\n    return price * pieces\n\nprint({name}({price}, {n}))  # {price * n}"


def made_up(rng):
    """A word of one to three syllables that means nothing."""
    starts, ends = (*"bdfghjklmnprstvwyz", "br", "dr", "st", "tr", "th"), ("", "", *"nrls")
    return "".join(rng.choice(starts) + rng.choice("aeiou") + rng.choice(ends) for _ in range(rng.randint(1, 3)))


def shop_document(lang, rng, split, products):
    """A long page: a shop's catalogue of many products (for the long-context stage)."""
    return "\n\n".join(page(draw_product(rng, split), lang, rng, split) for _ in range(products))


def ledger_lines(lang, rng, entries):
    """Lines "type colour: city", where a parcel lies; no two of the same type and colour."""
    lex = lexicon(lang)
    parcels = rng.sample([f"{kind} {colour}" for colour in lex["colours"].values() for kind in lex["types"].values()], entries)
    return [f"{parcel}: {rng.choice(list(lex['cities'].values()))}" for parcel in parcels]


def faq_document(lang, rng, split):
    """A product page with questions buyers ask, each followed by its answer."""
    product, lex = draw_product(rng, split), lexicon(lang)
    words = product.words(lang)
    lines = [page(product, lang, rng, split)]
    for kind in rng.sample(ASKED, 4):
        lines.append(f"{phrase(lex['questions'][kind][split], rng)} {words[kind]}")
    return "\n".join(lines)


def query_log(lang, rng, split):
    products = [draw_product(rng, split) for _ in range(4)]
    return "\n".join(f"{noisy_query(p, lang, rng, split)} → {clean_query(p, lang)}" for p in products)


def document(lang, rng, split, kind):
    """One document of a kind in MIXTURES."""
    if kind == "maths":
        return maths_document(rng, split)
    if kind == "code":
        return code_document(rng)
    if kind == "queries":
        return query_log(lang, rng, split)
    if kind == "faq":
        return faq_document(lang, rng, split)
    if kind == "shop":
        return shop_document(lang, rng, split, rng.randint(8, 20))
    product = draw_product(rng, split)
    if kind in ("chat", "mixed"):  # mixed: two languages in one sentence, as people type
        return rng.choice(lexicon(lang)["chats" if kind == "chat" else "mixed"]).format(**product.words(lang))
    if kind == "review":
        return review(product, lang, rng, split, rng.choices(("praise", "complaint"), k=2))[0]
    return page(product, lang, rng, split)


# kind -> weight, per pre-training stage: everything, then the cleanest, then long documents among short ones
MIXTURES = {
    "general": {"page": 20, "faq": 30, "review": 12, "chat": 8, "mixed": 3, "queries": 8, "maths": 17, "code": 2},
    "anneal": {"faq": 50, "queries": 10, "maths": 40},
    "long": {"faq": 30, "queries": 6, "maths": 20, "shop": 6},
    # Compass-v3: the market in its languages, then reasoning; extend and mtp read what long reads
    "market": {"page": 30, "faq": 30, "review": 12, "chat": 8, "mixed": 4, "queries": 16},
    "reasoning": {"maths": 60, "code": 10, "faq": 30},
}
MIXTURES["extend"] = MIXTURES["mtp"] = MIXTURES["long"]


def documents(stage, seed, split="train", per_language=2500):
    """Yield {"text", "lang", "kind"} for a stage of MIXTURES, languages in turn. Deterministic in (stage, seed, split)."""
    kinds, weights = zip(*MIXTURES[stage].items(), strict=True)
    rng = random.Random(f"{stage}-{seed}-{split}")
    for _ in range(per_language):
        for lang in LANGUAGES:
            kind = rng.choices(kinds, weights)[0]
            yield {"text": document(lang, rng, split, kind), "lang": lang, "kind": kind}


def main():
    cli.parse(__doc__)
    rng = random.Random(0)
    for lang in LANGUAGES:
        print(f"\n== {lexicon(lang)['name']}")
        for kind in ("page", "review", "chat", "queries"):
            print(f"[{kind}]\n{document(lang, rng, 'train', kind)}")


if __name__ == "__main__":
    cli.run(main)
