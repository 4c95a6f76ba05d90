"""Programmatic scorers: did the model's answer hit the reference? All scoring lives here."""

import re
import unicodedata


def normalise(text):
    """Compare words, not dress: NFKC, case folded, one space, no outer punctuation."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.strip(" .,!?:;\"'。，！？：；「」“”")


def exact(output, answer):
    """Equal after `normalise`."""
    return normalise(output) == normalise(answer)


def number(output, answer):
    """The last number of the output equals the answer's; 45.000, 45,000 and 45000 are one number."""

    def last(text):
        found = re.findall(r"\d{1,3}(?:[.,]\d{3})+(?!\d)|\d+(?:[.,]\d{1,2}(?!\d))?", text)
        if not found:
            return None
        digits = found[-1]
        if re.fullmatch(r"\d{1,3}(?:[.,]\d{3})+", digits):
            return float(re.sub("[.,]", "", digits))
        return float(digits.replace(",", "."))

    return last(output) is not None and last(output) == last(answer)


SCORERS = {"exact": exact, "number": number}
