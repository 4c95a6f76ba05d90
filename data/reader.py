"""Reads any folder of .txt and .jsonl (or .jsonl.gz) files, or the embedded marketplace when no folder is given; files of tasks, of pairs.

A .txt file is one document; a .jsonl line is {"text": …, "lang"?: …}. The language is the line's "lang", else the file's name when it is a
language code (th.jsonl), else unknown. Every twentieth document by hash is held out for measuring and never trained on.
"""

import codecs
import contextlib
import gzip
import json
import os
import zlib

from cli import InputError
from data import market
from data.scorers import SCORERS
from tokenizer import EUROPEAN, ROLES

BESIDE = (".counts", ".npy", ".part", "settings.json", "report.json")  # what the corpus chain leaves beside its documents
CODES = {*market.LANGUAGES, *EUROPEAN}


@contextlib.contextmanager
def opened(path):
    """The bytes of a file, unpacked if its name ends in .gz (or .GZ); where they cannot be, that is an error with its name."""
    with gzip.open(path) if str(path).lower().endswith(".gz") else open(path, "rb") as file:
        try:
            yield file
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"{path}: damaged gzip file ({error})") from None


def _lines(path):
    """(number, bytes) of a file's lines, without the byte order mark that may stand before the first."""
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def read_text(path):
    """The whole text of a file; a byte that is not UTF-8 is an error with its line."""
    pieces = []
    for number, line in _lines(path):
        try:
            pieces.append(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise InputError(f"{path}:{number}: not UTF-8 at byte {error.start + 1} of the line") from None
    return "".join(pieces)


def parsed(line):
    """A line's JSON value, from bytes. ValueError says what is wrong: also what is not UTF-8 or could not become it (half of a surrogate
    pair), and endless brackets."""
    try:
        value = json.loads(line.decode("utf-8"))
        if b"\\ud" in line.lower():
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start + 1} of the line") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at column {error.pos + 1}") from None
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair stands alone") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_jsonl(path, faults=None):
    """(line number, object) of each line; malformed JSON or a line that is no object is an error with its line, or one more of `faults`."""
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            value = parsed(line)
            fault = None if isinstance(value, dict) else f"expected a JSON object, got {type(value).__name__}"
        except ValueError as error:
            fault = f"malformed JSON ({error})"
        if fault is None:
            yield number, value
        elif faults is None:
            raise InputError(f"{path}:{number}: {fault}")
        else:
            faults.append(f"{path}:{number}: {fault}")


def message_faults(messages):
    """What is wrong with a chat that is to be answered: one sentence each."""
    if not isinstance(messages, list) or not messages:
        yield 'field "messages" is missing, empty or no list'
        messages = []
    for message in messages:
        fields = message if isinstance(message, dict) else {}
        texts = fields.get("content"), fields.get("think", "")
        if fields.get("role") not in ROLES or not all(isinstance(text, str) for text in texts) or not texts[0].strip():
            yield f"a message needs a role ({', '.join(ROLES)}) and text as content (and think, if any), got {message!r:.80}"
        elif message is messages[-1] and message["role"] != "user":
            yield f"the last message must be the user's, got one of {message['role']}"


def task_faults(task):
    """What is wrong with a task that a user wrote: one sentence each."""
    answer = task.get("answer")
    yield from message_faults(task.get("messages"))
    if not isinstance(answer, str) or not answer.strip():
        yield 'field "answer" is missing, empty or no text'
    elif "<think>" in answer:
        yield 'field "answer" holds a thought, which no scorer sees: give it as "think"'
    for field in ("id", "task", "lang", "think"):
        if field in task and not (isinstance(task[field], str) and task[field]):
            yield f'field "{field}" is empty or no text'
    scorer = task.get("scorer", "exact")
    if scorer not in list(SCORERS):
        yield f"unknown scorer {scorer!r}, known: {', '.join(SCORERS)}"
    elif isinstance(answer, str) and answer.strip() and (SCORERS[scorer]("", answer) or not SCORERS[scorer](answer, answer)):
        yield f"scorer {scorer!r} cannot judge the answer {answer!r}: it refuses it, or accepts silence"
    if "choices" in task:
        choices = task["choices"]
        if not isinstance(choices, list) or answer not in choices or not all(isinstance(choice, str) and choice for choice in choices):
            yield 'field "choices" must be a list of texts with the answer among them'
        elif len(set(choices)) < len(choices):
            yield 'field "choices" has a choice twice'


def read_tasks(path):
    """Tasks of a .jsonl file, one {messages, answer, id?, task?, lang?, scorer?, choices?, think?} a line.

    What is left out is filled in: the line number as id, "task", "?" and the scorer exact. Raises InputError with one line
    for each fault of the file.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such task file")
    tasks, faults, ids = [], [], {}
    for number, task in read_jsonl(path, faults):
        task = {"id": f"line {number}", "task": "task", "lang": "?", "scorer": "exact", **task}
        faults += [f"{path}:{number}: {fault}" for fault in task_faults(task)]
        if (first := ids.setdefault(str(task["id"]), number)) != number:
            faults.append(f"{path}:{number}: id {task['id']!r} is also the id of line {first}")
        tasks.append(task)
    if faults:
        raise InputError("\n".join(faults))
    if not tasks:
        raise InputError(f"{path}: empty file")
    return tasks


def read_pairs(path):
    """Pairs of a .jsonl file, {messages, chosen, rejected} a line; a line that is none is an error with its number."""
    if not os.path.isfile(path):
        raise InputError(f"--data {path}: no such file of pairs")
    pairs = []
    for number, pair in read_jsonl(path):
        for field in ("chosen", "rejected"):
            if not isinstance(pair.get(field), str):
                raise InputError(f'{path}:{number}: field "{field}" is missing or no text')
        for fault in message_faults(pair.get("messages")):
            raise InputError(f"{path}:{number}: {fault}")
        pairs.append({"id": str(number), **pair})
    if not pairs:
        raise InputError(f"{path}: empty file")
    return pairs


def files_in(folder, endings):
    """Names of a folder's files with one of the endings, in order. Raises InputError where there is none."""
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder")
    found = [name for name in sorted(os.listdir(folder)) if name.lower().endswith(endings)]
    if not found:
        raise InputError(f"{folder}: holds no file ending in {' '.join(endings)}")
    return found


def printable(name):
    """A file's name as text that UTF-8 can hold, whatever its bytes."""
    return os.fsencode(name).decode(errors="replace")


def listed(names):
    """How many, and the first five."""
    names = list(map(printable, names))
    return f"{len(names)} ({', '.join(names[:5])}{', …' if len(names) > 5 else ''})"


def say_unread(folder, found):
    """Print what of a folder is passed over, but for what the corpus chain leaves beside its documents."""
    if other := sorted(name for name in set(os.listdir(folder)).difference(found) if not name.endswith(BESIDE)):
        print(f"{folder}: files and folders that are not read: {listed(other)}")


def read_folder(folder):
    """Yield {"text", "lang", "kind"} for every document of a folder, files in name order."""
    empty, names = [], files_in(folder, (".txt", ".jsonl", ".jsonl.gz"))
    say_unread(folder, names)
    for name in names:
        path, stem = os.path.join(folder, name), name.split(".")[0]
        default = stem if stem in CODES else None
        documents = 0
        if name.lower().endswith(".txt"):
            text = read_text(path)
            if text.strip():
                documents += 1
                yield {"text": text, "lang": default, "kind": stem}
        else:
            for number, value in read_jsonl(path):
                text, lang = value.get("text"), value.get("lang", default)
                if not isinstance(text, str) or not text.strip():
                    raise InputError(f'{path}:{number}: field "text" is missing or empty')
                if lang not in (None, *CODES):
                    raise InputError(f"{path}:{number}: unknown language {lang!r}, known: {' '.join(sorted(CODES))}")
                documents += 1
                yield {"text": text, "lang": lang, "kind": value.get("source", stem)}
        if not documents:
            empty.append(name)
    if len(empty) == len(names):
        raise InputError(f"{folder}: all files are empty")
    if empty:
        print(f"{folder}: files that are empty: {listed(empty)}")


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
