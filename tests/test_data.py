"""data/: the two worlds are apart, scorers accept references and refuse mutations, everything is a function of the seed."""

import random
from itertools import islice

import pytest

from data import market
from data.scorers import SCORERS
from data.tasks import TASKS, conversations, tasks


@pytest.fixture(scope="module")
def both():
    return tasks("train", 0, 15), tasks("test", 0, 15)


def text_of(task):
    return "\n".join(message["content"] for message in task["messages"])


def test_every_task_in_every_language(both):
    for made in both:
        assert {(t["task"], t["lang"]) for t in made} == {(n, lang) for n in TASKS for lang in market.LANGUAGES}
        assert len({t["id"] for t in made}) == len(made)
        for task in made:
            assert task["answer"] and task["scorer"] in SCORERS and task["messages"][-1]["role"] == "user"
            assert task["answer"] in task.get("choices", [task["answer"]])
            assert "{" not in text_of(task)


def test_no_held_out_product_or_phrasing_in_training(both):
    trained = "\n".join(text_of(task) for task in both[0]) + "\n".join(text_of(t) for t in conversations(0, 20))
    trained += "\n".join(d["text"] for stage in market.MIXTURES for d in islice(market.documents(stage, 0), 2000))
    rng = random.Random(0)
    for _ in range(300):
        product = market.draw_product(rng, "test")
        assert product.split == "test" and f"{product.name} " not in trained
    for lang in market.LANGUAGES:
        lex = market.lexicon(lang)
        for group in (*lex["questions"].values(), {"train": lex["pages"]["train"], "test": lex["pages"]["test"]}):
            assert not set(group["train"]) & set(group["test"])


def test_deterministic_in_the_seed(both):
    assert tasks("test", 0, 15) == both[1] != tasks("test", 1, 15)
    assert list(market.documents("long", 4, per_language=2)) == list(market.documents("long", 4, per_language=2))


def test_scorers_accept_the_reference_and_refuse_mutations(both):
    for task in both[1]:
        score = SCORERS[task["scorer"]]
        assert score(task["answer"], task["answer"]) and score(f" {task['answer']}. ", task["answer"])
        assert not score("", task["answer"]) and not score(task["answer"] + "0", task["answer"])
        others = [choice for choice in task.get("choices", []) if choice != task["answer"]]
        assert not any(score(other, task["answer"]) for other in others)


@pytest.mark.parametrize("output", ["Rp135.000", "135,000", "it is 135000.", "90.000 + 45.000 = 135.000", "135000₫"])
def test_numbers_in_any_dress(output):
    assert SCORERS["number"](output, "Rp135.000") and not SCORERS["number"](output, "Rp135.001")


def test_answers_can_be_checked_against_the_world():
    """Arithmetic of the thoughts, and the fields the answers claim."""
    for task in tasks("train", 2, 10):
        if task["task"] in ("mathematics", "numerical_reasoning"):
            last = task["think"].strip(" .。").split("= ")[-1]
            digits = "".join(c for c in task["answer"] if c.isdigit())
            assert digits.startswith(last) and set(digits[len(last) :]) <= {"0"}
        elif task["task"] in ("recommendation", "product_info", "attribute_extraction"):
            assert task["answer"] in text_of(task)
