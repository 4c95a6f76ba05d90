"""The corpus chain: steps that turn any folder of text, web pages or crawls into clean documents (v2 §2.1).

    extract   HTML, WARC, .txt, .jsonl(.gz) to documents         data/extract.py
    langid    language of every sentence, wrong labels mended    data/langid.py
    dedup     exact and near duplicates, good repeats kept       data/dedup.py
    filter    boilerplate, spam, broken text; code and maths apart   data/filters.py

A step reads a folder and writes one .jsonl for each input file: documents one by one (memory flat but for dedup's index), files
over all cores, each written aside and renamed when complete. Killed, it goes on with the files it had not finished,
and the output is the same. report.json in the output folder counts what was removed and why.

    python -m data.chain --step extract --data crawl --out corpus/1
    python -m data.chain --step dedup --data corpus/1 --out corpus/2
"""

import functools
import json
import os
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

from tqdm import tqdm

import cli
from cli import InputError
from data import dedup, filters, langid
from data.extract import ENDINGS, documents_of


def files_of(folder):
    """{name: path} of the files a step reads, in name order. Raises InputError when there is none."""
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder")
    found = {name: os.path.join(folder, name) for name in sorted(os.listdir(folder)) if name.endswith(ENDINGS)}
    if not found:
        raise InputError(f"{folder}: holds no file ending in {' '.join(ENDINGS)}")
    return found


def output_name(name):
    """th.jsonl and th.jsonl.gz stay th.jsonl; page.html becomes page.html.jsonl, so that no two inputs meet."""
    return name if name.endswith(".jsonl") else name.removesuffix(".jsonl.gz") + ".jsonl"


def _write_json(path, value):
    with open(path + ".part", "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
    os.replace(path + ".part", path)


def _process(step, job):
    """Run one file through the step; its counts are renamed into place before its documents, which mark it done."""
    source, target = job
    counts, began = Counter(), time.perf_counter()

    def read():
        for document in documents_of(source):
            counts["documents in"] += 1
            counts["bytes in"] += len(document["text"].encode())
            yield document

    def written():
        for document in step(read(), counts, source):
            counts["documents out"] += 1
            counts["bytes out"] += len(document["text"].encode())
            yield json.dumps(document, ensure_ascii=False) + "\n"

    with open(target + ".part", "w", encoding="utf-8") as file:
        file.writelines(written())
    counts["seconds"] = time.perf_counter() - began
    _write_json(target + ".counts", counts)
    os.replace(target + ".part", target)


def claim(out, settings):
    """Make the output folder of a step; one that holds the output of another step, settings or input is an error."""
    os.makedirs(out, exist_ok=True)
    path = os.path.join(out, "settings.json")
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            if json.load(file) != settings:
                raise InputError(f"{out}: holds the output of another step, other settings or other input; choose another folder")
    _write_json(path, settings)


def run(name, step, source, out, workers=None):
    """Apply `step(documents, counts, path) -> documents` to every file of `source`; return the report, also in out/report.json.

    step must be picklable, is a generator over one file's documents, and counts each removal as "removed: <reason>".
    """
    jobs = [(path, os.path.join(out, output_name(file))) for file, path in files_of(source).items()]
    if len({target for _, target in jobs}) < len(jobs):
        raise InputError(f"{source}: a .jsonl and a .jsonl.gz file have the same name")
    pending = [job for job in jobs if not os.path.exists(job[1])]
    with ProcessPoolExecutor(workers) as pool:
        list(tqdm(pool.map(functools.partial(_process, step), pending), total=len(pending), desc=name, unit="file"))
    totals = Counter()
    for _, target in jobs:
        with open(target + ".counts", encoding="utf-8") as file:
            totals.update(json.load(file))
    report = {"step": name, **dict(sorted(totals.items()))}
    _write_json(os.path.join(out, "report.json"), report)
    return report


def keep_nonempty(documents, counts, source):
    """The extract step: what is left after reading, without empty documents."""
    for document in documents:
        if document["text"].strip():
            yield document
        else:
            counts["removed: empty"] += 1


def main():
    args = cli.parse(
        __doc__, "data",
        data=dict(required=True, help="folder to read"),
        out=dict(required=True, help="folder to write"),
        step=dict(required=True, choices=("extract", "langid", "dedup", "filter")),
        keep=dict(type=int, default=1, help="dedup: copies to keep of a repeated document whose quality is good"),
    )  # fmt: skip
    if os.path.realpath(args.data) == os.path.realpath(args.out):
        raise InputError(f"{args.out}: a step cannot write into the folder that it reads")
    paths = list(files_of(args.data).values())
    claim(args.out, {"step": args.step, "keep": args.keep, "input": {path: os.path.getsize(path) for path in paths}})
    steps = {"extract": keep_nonempty, "langid": langid.step, "filter": filters.step}
    step = steps[args.step] if args.step in steps else dedup.plan(paths, args.out, args.keep)
    report = run(args.step, step, args.data, args.out)
    for key, value in report.items():
        print(f"{key:>24}: {value:,.1f}" if isinstance(value, float) else f"{key:>24}: {value}")


if __name__ == "__main__":
    cli.run(main)
