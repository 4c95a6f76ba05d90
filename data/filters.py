"""Heuristic filters, separate for prose, code and maths (v2 §2.1.1): why a document goes, in one word.

Prose loses boilerplate lines first and is then judged; code and maths would fail the rules of prose (few letters, repeated
lines) and have their own. The thresholds are ours: the report gives none.

    python -m data.chain --step filter --data corpus/2-langid --out corpus/3-filter
"""

import re
from collections import Counter

# Thai and Chinese write no spaces: a character counts as a word
WORD = re.compile(r"[\u0e00-\u0e7f\u3400-\u9fff]|[^\W_\u0e00-\u0e7f\u3400-\u9fff]+")
URL = re.compile(r"https?://|www\.", re.IGNORECASE)
BOILERPLATE = re.compile(  # cookies; rights; log in; share; privacy and terms, in the languages of the marketplace
    r"\bcookies?\b|\bkuki\b|คุกกี้"
    r"|all rights reserved|版权所有|hak cipta|direitos reservados|nakalaan ang lahat|สงวนลิขสิทธิ์|bản quyền"
    r"|\blog ?in\b|\bsign (in|up)\b|登录|masuk atau daftar|log masuk|entre ou cadastre|เข้าสู่ระบบ|đăng nhập"
    r"|\bshare (this|on|ang)\b|分享本页|(bagikan|kongsi) (halaman|ini)|compartilhe est|แชร์หน้า|chia sẻ (trang|bài)"
    r"|privacy|terms (of|and) (use|service|conditions)|隐私政策|privasi|syarat dan ketentuan|política de privacidade"
    r"|นโยบายความเป็นส่วนตัว|chính sách bảo mật|enable javascript|skip to (main )?content|\bsubscribe\b",
    re.IGNORECASE,
)
CODE = re.compile(
    r"^\s*(def |class |import |from \w+ import|#include|function |public |const |let |var |package |return\b|[{}]\s*$)", re.MULTILINE
)
MOJIBAKE = re.compile(r"[\u00c2-\u00ef][\u0080-\u009f\u00a1-\u00bf]")  # UTF-8 read as Latin-1
MATHS = re.compile(r"\d\s*[+×*÷=−]\s*\d|\d [/-] \d")  # 17-03-2024 is no subtraction


def kind_of(document):
    """ "code", "maths" or "prose": the document's "kind" if it says so, else by how many lines look like it."""
    if document.get("kind") in ("code", "maths", "prose"):
        return document["kind"]
    lines = [line for line in document["text"].split("\n") if line.strip()]
    if sum(map(bool, map(CODE.match, lines))) >= max(2, 0.3 * len(lines)):
        return "code"
    return "maths" if sum(map(bool, map(MATHS.search, lines))) > 0.5 * len(lines) else "prose"


def without_boilerplate(text):
    """The text without short lines that every site repeats. A line of wrapped prose, which begins or goes on in lower case, stays."""
    lines = text.split("\n")

    def cut(i, line):
        wrapped = len(line) > 55 and any(near[:1].islower() for near in lines[i : i + 2])
        return len(line) <= 80 and not wrapped and BOILERPLATE.search(line)

    return "\n".join(line for i, line in enumerate(lines) if not cut(i, line))


def fault_of_prose(text):
    """The first rule a text breaks, or None."""
    words = WORD.findall(text.casefold())
    if len(words) < 5:
        return "too short"
    visible = re.sub(r"\s", "", text)
    if visible.count("\ufffd") + len(MOJIBAKE.findall(text)) > 0.05 * len(words):
        return "broken encoding"
    letters = sum(c.isalpha() or "\u0e31" <= c <= "\u0e4e" or "\u0300" <= c <= "\u036f" for c in visible)
    if letters < 0.5 * len(visible):
        return "few letters"
    if len(URL.findall(text)) > 0.05 * len(words):
        return "links"
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if len(lines) - len(set(lines)) > 0.3 * len(lines):
        return "repeated lines"
    n = 3 if sum(map(len, words)) > 2 * len(words) else 10  # ten characters where characters count as words
    grams = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    if sum(count for count in grams.values() if count > 2) > 0.3 * grams.total() > 0:
        return "repeated words"
    return None


def fault_of_code(text):
    lines = text.split("\n")
    if max(map(len, lines)) > 1000:
        return "minified"
    if re.search(r"(?i)(auto-?generated|do not edit)", "\n".join(lines[:5])):
        return "generated"
    return None if sum(c.isalpha() for c in text) >= 0.25 * len(text) else "few letters"


def fault_of_maths(text):
    return None if len(re.findall(r"\d", text)) >= 4 and len(text) < 200_000 else "no maths"


FAULTS = {"prose": fault_of_prose, "code": fault_of_code, "maths": fault_of_maths}


def step(documents, counts, source):
    """The filter step: cut boilerplate lines from prose, then drop what breaks a rule of its kind."""
    for document in documents:
        kind, text = kind_of(document), document["text"]
        if kind == "prose":
            text = without_boilerplate(text)
            before, after = (t.count("\n") + bool(t) for t in (document["text"], text))
            counts["boilerplate lines cut"] += before - after
        fault = FAULTS[kind](text) if text.strip() else "empty"
        if fault:
            counts[f"removed: {kind}, {fault}"] += 1
        else:
            yield {**document, "text": text}
