"""The end of the chain: documents to shards of uint32 tokens with document boundaries, which training maps instead of loading.

For each input file <name>.tokens (uint32, little-endian, each document ended by <|endoftext|>) and <name>.ends (int64: where each
document ends), and one shards.json with the tokenizer's hash and the counts. Files are done in parallel, memory is flat, and a
finished file is not done again. Documents held out for measuring (reader.held_out) are left out.

    python -m data.shards --data corpus/6-resample --out shards --run runs/small     # with the tokenizer of runs/small
    python train.py --data shards --run runs/small
"""

import functools
import json
import os

import numpy as np
from tqdm import tqdm

import cli
from cli import InputError
from data.chain import claim
from data.extract import documents_of, files_of, processes, write_json
from data.reader import held_out, say_unread
from tokenizer import Tokenizer

INDEX = "shards.json"


tokenizer_of = functools.cache(Tokenizer.load)  # in each worker once, not once a file


def write_shard(run, job):
    """Tokenise one file; its ends are renamed into place last and mark it done. Returns how many documents were blank and left out."""
    (source, target), ends, at, blank = job, [], 0, 0
    tokenizer = tokenizer_of(run)
    with open(target + ".tokens.part", "wb") as file:
        for document in documents_of(source):
            if not document["text"].strip():
                blank += 1
            elif not held_out(document["text"]):
                ids = np.array([*tokenizer.encode(document["text"]), tokenizer.special["<|endoftext|>"]], "<u4")
                file.write(ids.tobytes())
                at += len(ids)
                ends.append(at)
    os.replace(target + ".tokens.part", target + ".tokens")
    np.array(ends, "<i8").tofile(target + ".ends.part")
    os.replace(target + ".ends.part", target + ".ends")
    return blank


def write_shards(source, out, run, workers=None):
    """Tokenise a folder; return the index, also in out/shards.json. Raises InputError where `out` holds other shards."""
    files, tokenizer_hash = files_of(source), Tokenizer.load(run).hash
    say_unread(source, files)
    claim(out, files.values(), step="shards", tokenizer=tokenizer_hash)
    targets = {name: os.path.join(out, name) for name in files}
    pending = [(files[name], target) for name, target in targets.items() if not os.path.exists(target + ".ends")]
    with processes(workers) as pool:
        bar = tqdm(pool.map(functools.partial(write_shard, run), pending), total=len(pending), desc="shards", unit="file")
        for (path, _), blank in zip(pending, bar, strict=True):
            if blank:
                tqdm.write(f"{path}: {blank} blank documents left out")
    index = {"tokenizer_hash": tokenizer_hash, "shards": []}
    for name, target in targets.items():
        ends = np.fromfile(target + ".ends", "<i8")
        if len(ends):
            index["shards"].append({"name": name, "documents": len(ends), "tokens": int(ends[-1])})
    if not index["shards"]:
        raise InputError(f"{source}: holds no training document")
    write_json(os.path.join(out, INDEX), index)
    return index


def is_shards(folder):
    """Whether `folder` holds shards, finished or not."""
    names = os.listdir(folder) if folder is not None and os.path.isdir(folder) else ()
    return any(name == INDEX or name.endswith((".tokens", ".tokens.part")) for name in names)


class Shards:
    """All documents of a folder of shards: `lengths` (N,) int64 with the end token, `document(i)` a view of the mapped tokens.

    Raises InputError on unfinished or torn shards, or another tokenizer's.
    """

    def __init__(self, folder, tokenizer):
        path = os.path.join(folder, INDEX)
        if not os.path.exists(path):
            raise InputError(f"{path} not found: the shards are not finished; run `python -m data.shards` to its end")
        try:
            with open(path, encoding="utf-8") as file:
                index = json.load(file)
            found, shards = index["tokenizer_hash"], [(shard["name"], shard["documents"], shard["tokens"]) for shard in index["shards"]]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}: not what `python -m data.shards` wrote") from None
        if found != tokenizer.hash:
            raise InputError(f"{folder}: shards of another tokenizer ({found[:12]}, this run has {tokenizer.hash[:12]})")
        self.paths, self.ends, self.vocabulary = [], [], tokenizer.n_vocab
        for name, documents, tokens in shards:
            name = os.path.join(folder, name)
            if os.path.getsize(name + ".tokens") != 4 * tokens:
                raise InputError(f"{name}.tokens: {os.path.getsize(name + '.tokens')} bytes, expected {4 * tokens} (a torn file?)")
            ends = np.fromfile(name + ".ends", "<i8")
            if len(ends) != documents or ends[-1] != tokens:
                raise InputError(f"{name}.ends: does not fit {INDEX} (a torn file?)")
            self.paths.append(name + ".tokens")
            self.ends.append(ends)
        self.tokens = functools.lru_cache(256)(lambda shard: np.memmap(self.paths[shard], "<u4", mode="r"))  # each holds its file open
        self.first = np.cumsum([0, *map(len, self.ends)])
        self.lengths = np.concatenate([np.diff(ends, prepend=0) for ends in self.ends])

    def document(self, i):
        shard = np.searchsorted(self.first, i, side="right") - 1
        k = i - self.first[shard]
        ids = self.tokens(shard)[self.ends[shard][k] - self.lengths[i] : self.ends[shard][k]]
        if (largest := ids.max()) >= self.vocabulary:
            raise InputError(f"{self.paths[shard]}: document {k + 1} holds token {largest} of {self.vocabulary} (a damaged file?)")
        return ids


def main():
    args = cli.parse(
        __doc__, "data", "run",
        data=dict(required=True, help="folder of documents"),
        out=dict(required=True, help="folder to write the shards to"),
    )  # fmt: skip
    for shard in write_shards(args.data, args.out, args.run)["shards"]:
        print(f"{shard['name']}: {shard['documents']:,} documents, {shard['tokens']:,} tokens")


if __name__ == "__main__":
    cli.run(main)
