"""Programmatic scorers: did the model's answer hit the reference? All scoring lives here.

Each is a function (output, answer) -> bool of two texts; the reference itself always passes.
"""

import ast
import json
import operator
import re
import unicodedata


def normalise(text):
    """Compare words, not dress: NFKC, case folded, one space, no outer punctuation."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.strip(" .,!?:;\"'。，！？：；「」“”")


def exact(output, answer):
    """Equal after `normalise`."""
    return normalise(output) == normalise(answer)


# a minus sign, not behind a word, a bracket or a percentage (that one subtracts or joins), perhaps a currency; then groups of three
# digits with or without a fraction, or digits with or without one
NUMBER = re.compile(r"((?<![\w)%])[-−](?:R\$|Rp|RM|[$¥฿₱])?)?(?:([1-9]\d{0,2}(?:[.,]\d{3})+)(?:[.,](\d{1,2}))?(?!\d)|(\d+(?:[.,]\d+)?))")


def last_number(text):
    """The value of the last number in a text, None where there is none; 45.000, 45,000 and 45000 are one number."""
    found = list(NUMBER.finditer(text))
    if not found:
        return None
    minus, groups, fraction, plain = found[-1].groups()
    digits = re.sub("[.,]", "", groups) + "." + (fraction or "0") if groups else plain.replace(",", ".")
    return -float(digits) if minus else float(digits)


def number(output, answer):
    """The last number of the output equals the answer's."""
    return last_number(output) is not None and last_number(output) == last_number(answer)


def covers(output, answer):
    """Every part of the reference (between , : ; or their full-width forms) stands in the output, in any order, and the
    output is at most twice as long."""

    def parts(text):
        return [part for piece in re.split(r"[,:;，：；、]\s*(?!\d{3})", text) if (part := normalise(piece))]

    def alone(part):
        """A pattern of the part as it stands, not as the end or beginning of a longer word or number."""
        before = r"(?<!\d)(?<!\d[.,])" if part[0].isdigit() else ""
        behind = r"(?![.,]?\d)" if part[-1].isdigit() else ""
        word = (r"(?<!\w)", r"(?!\w)") if part.isascii() else ("", "")  # Thai and Chinese write no spaces
        return before + word[0] + re.escape(part) + word[1] + behind

    given = normalise(output)
    return all(re.search(alone(part), given) for part in parts(answer)) and len(given) <= 2 * len(normalise(answer))


OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv, ast.Mod: operator.mod,
}  # fmt: skip
CALLS = {"max": max, "min": min, "abs": abs}


def _value(node, names):
    """Value of an arithmetic expression; the model's code is never executed. Raises ValueError on anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, names)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.left, names), _value(node.right, names))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS and node.args and not node.keywords:
        return CALLS[node.func.id](*(_value(argument, names) for argument in node.args))
    raise ValueError("not plain arithmetic")


def _table(source):
    """(function name, its values at fixed arguments) of `def f(a, b): return <arithmetic>`; None if it is anything else."""
    try:
        (function,) = ast.parse(source.strip()).body
        (statement,) = function.body
        if not isinstance(function, ast.FunctionDef) or not isinstance(statement, ast.Return) or function.args.kwonlyargs:
            return None
        names = [argument.arg for argument in function.args.args]
        points = [(7, 3), (3, 7), (20, 6), (5, 5), (1, 12)]
        return function.name, [_value(statement.value, dict(zip(names, point, strict=True))) for point in points]
    except (SyntaxError, ValueError, AttributeError, TypeError, ArithmeticError, RecursionError, MemoryError):
        return None


def code(output, answer):
    """The output defines a function of the reference's name that returns the same values."""
    return _table(output) is not None and _table(output) == _table(answer)


def json_call(output, answer):
    """Equal as JSON values, whatever the order of keys and the white space; true is not 1."""
    try:
        one, other = (json.dumps(json.loads(text, parse_int=float), sort_keys=True) for text in (output, answer))
        return one == other
    except (ValueError, RecursionError):
        return False


SCORERS = {"exact": exact, "number": number, "covers": covers, "code": code, "json": json_call}
