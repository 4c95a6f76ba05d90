"""Reads any folder of .txt and .jsonl files, or the embedded marketplace when no folder is given.

A .txt file is one document; a .jsonl line is {"text": …, "lang"?: …}. The language is the line's "lang", else the
file's name when it is a language code (th.jsonl), else unknown. Every twentieth document by hash is
held out for measuring and never trained on.
"""

import gzip
import json
import os
import zlib

from cli import InputError
from data import market

CODES = set(market.LANGUAGES) | set(["nl", "fr", "de", "el", "it", "pl", "ru", "es", "uk"])


def _lines(path):
    """(number, line) of a file's lines, unpacked if it ends in .gz; a byte that is not UTF-8 is an error with its line."""
    with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{path}:{number}: not UTF-8 at byte {error.start + 1} of the line") from None


def read_text(path):
    """The whole text of a file; a byte that is not UTF-8 is an error with its line."""
    return "".join(line for _, line in _lines(path))


def read_jsonl(path):
    """(line number, object) of each line; malformed JSON or a line that is no object is an error with its line."""
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number}: malformed JSON ({error.msg} at column {error.colno})") from None
        if not isinstance(value, dict):
            raise InputError(f"{path}:{number}: expected a JSON object, got {type(value).__name__}")
        yield number, value


def read_folder(folder):
    """Yield {"text", "lang", "kind"} for every document of a folder, files in name order."""
    if not os.path.isdir(folder):
        raise InputError(f"--data {folder}: no such folder")
    names = sorted(name for name in os.listdir(folder) if name.endswith((".txt", ".jsonl")))
    if not names:
        raise InputError(f"--data {folder}: holds no .txt or .jsonl file")
    for name in names:
        path, (stem, ending) = os.path.join(folder, name), os.path.splitext(name)
        default = stem if stem in CODES else None
        documents = 0
        if ending == ".txt":
            text = read_text(path)
            if text.strip():
                documents += 1
                yield {"text": text, "lang": default, "kind": stem}
        else:
            for number, value in read_jsonl(path):
                text, lang = value.get("text"), value.get("lang", default)
                if not isinstance(text, str) or not text.strip():
                    raise InputError(f'{path}:{number}: field "text" is missing or empty')
                if lang is not None and lang not in CODES:
                    raise InputError(f"{path}:{number}: unknown language {lang!r}, known: {' '.join(sorted(CODES))}")
                documents += 1
                yield {"text": text, "lang": lang, "kind": value.get("source", stem)}
        if not documents:
            raise InputError(f"{path}: empty file")


def held_out(text):
    return zlib.crc32(text.encode()) % 20 == 0


def documents(folder, stage, seed, split="train"):
    """Training or test documents of a stage: from `folder`, or from the marketplace when it is None."""
    if folder is None:
        yield from market.documents(stage, seed, split, per_language=2500 if split == "train" else 40)
        return
    for document in read_folder(folder):
        if held_out(document["text"]) == (split == "test"):
            yield document
