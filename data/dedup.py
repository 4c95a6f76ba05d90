"""Exact and near-duplicate removal by MinHash and locality-sensitive hashing (v2 §2.1.1).

Two documents whose sets of word 5-grams overlap by a Jaccard index J agree in each of P MinHashes with
probability J. The P values are cut into bands of R: documents that agree in a whole band are candidates
(probability 1 - (1 - J^R)^(P/R)), and candidates that agree in at least THRESHOLD of all P are duplicates. That share is J give or take
sqrt(J (1 - J) / P), 0.04 here: of 500 pages that all overlap by 0.69, as those of one template may, 1 to 18 % went (six draws), at
0.73 20 to 58 %, at 0.76 31 to 83 %. Duplicates are joined to clusters (union-find); of a cluster the first document stays, and the
report's policy lets good documents stay repeated: up to `keep` copies whose "quality" is at least GOOD. The first one kept learns its
cluster's size as "occurrences", which resampling wants to know; the other copies have 1, so that nothing is resampled twice.

Shapes: N documents, P hash functions, S shingles. Signatures take 4 P bytes a document, and the whole plan about 1.6 kB: it is
the one step whose memory grows with the corpus.
"""

import functools
import hashlib
import os
import re
import time
import zlib
from collections import Counter

import numpy as np
from tqdm import tqdm

from data.extract import documents_of, processes

P, R = 112, 8  # 14 bands of 8: half of the pairs at J = 0.68 become candidates, 99 % at 0.85
SHINGLE = 5  # words; in Thai and Chinese, which write no spaces, characters
THRESHOLD, GOOD = 0.8, 0.5
FIRSTS = 64  # documents of a group that all others are compared with
PRIME = np.uint64((1 << 31) - 1)
A_P, B_P = np.random.default_rng(0).integers(1, PRIME, (2, P), dtype=np.uint64)


def shingles(text):
    """Hashes below 2^31 of the distinct 5-grams of a text, (S,) uint64; a shorter text is one shingle."""
    words = re.findall(r"[\u0e00-\u0e7f\u3400-\u9fff]|[^\W\u0e00-\u0e7f\u3400-\u9fff]+", text.casefold())
    words = words or list("".join(text.split()))  # signs only
    grams = {" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}
    return np.array([zlib.crc32(gram.encode()) & 0x7FFFFFFF for gram in grams], dtype=np.uint64)


def signature(text):
    """MinHash signature, (P,) uint32: for each hash function the least value over the shingles."""
    hashes_S = shingles(text)
    least_P = np.full(P, PRIME, dtype=np.uint64)
    for start in range(0, len(hashes_S), 4096):  # products below 2^62 fit in uint64
        hashed_SP = (hashes_S[start : start + 4096, None] * A_P + B_P) % PRIME
        np.minimum(least_P, hashed_SP.min(axis=0), out=least_P)
    return least_P.astype(np.uint32)


class Clusters:
    """Union-find over 0..n-1; the root of a cluster is its least member."""

    def __init__(self, n):
        self.parent = list(range(n))

    def find(self, i):
        while self.parent[i] != i:
            self.parent[i] = i = self.parent[self.parent[i]]
        return i

    def join(self, i, j):
        i, j = sorted((self.find(i), self.find(j)))
        self.parent[j] = i


def near_duplicates(signatures_NP, threshold=THRESHOLD):
    """Clusters of documents that share a band and agree in `threshold` of all values with the first of their group.

    What is not alike makes a group of its own, up to FIRSTS of them: pages of one template, thousands that share a band and differ
    enough, would else cost their number squared. Duplicates among the rest mostly meet in other bands, where the template is not all.
    """
    clusters = Clusters(len(signatures_NP))
    for start in range(0, P, R):
        band_NR = np.ascontiguousarray(signatures_NP[:, start : start + R])
        keys_N = band_NR.view([("", band_NR.dtype)] * R).ravel()
        order = np.argsort(keys_N, kind="stable")
        edges = np.flatnonzero(np.append(keys_N[order[1:]] != keys_N[order[:-1]], True)) + 1
        for begin, end in zip(np.append(0, edges[:-1]), edges, strict=True):
            bucket = order[begin:end]
            for _ in range(FIRSTS):
                if len(bucket) < 2:
                    break
                first, others = bucket[0], bucket[1:]
                alike = (signatures_NP[others] == signatures_NP[first]).mean(axis=1) >= threshold
                for other in others[alike]:
                    clusters.join(int(first), int(other))
                bucket = others[~alike]
    return clusters


EXACT, NEAR = 0, -1  # verdicts on dropped documents; of the kept ones a cluster's first has its size, others 1


def verdicts(texts_N, signatures_NP, quality_N, keep, threshold=THRESHOLD):
    """(N,) int32: the number of occurrences of a document that stays, EXACT or NEAR for one that goes.

    texts_N: a hash of each whole text; quality_N: scores in 0..1; keep: copies of a good document that may stay.
    """
    clusters, seen, exact = near_duplicates(signatures_NP, threshold), {}, np.zeros(len(texts_N), bool)
    for i, text in enumerate(texts_N):
        if text in seen:
            clusters.join(seen[text], i)
            exact[i] = True
        seen.setdefault(text, i)
    roots = [clusters.find(i) for i in range(len(texts_N))]
    size, kept = Counter(roots), Counter()
    result = np.empty(len(texts_N), np.int32)
    for i, root in enumerate(roots):
        stays = kept[root] < (keep if quality_N[i] >= GOOD else 1)
        kept[root] += stays
        result[i] = (size[root] if kept[root] == 1 else 1) if stays else EXACT if exact[i] else NEAR
    return result


def _read(path):
    """(hashes of the whole texts, signatures, qualities) of a file's documents, and the seconds that took."""
    texts, signatures, qualities, began = [], [], [], time.perf_counter()
    for document in documents_of(path):
        texts.append(hashlib.blake2b(document["text"].encode(), digest_size=8).digest())
        signatures.append(signature(document["text"]))
        qualities.append(document.get("quality", 0.0))
    return texts, np.array(signatures, np.uint32).reshape(-1, P), qualities, time.perf_counter() - began


def plan(paths, out, keep=1, workers=None):
    """Judge the documents of all files together; return the step that applies the verdicts, file by file.

    The verdicts lie in out/<file>.verdicts.npy, in a folder that chain.claim has made.
    """
    with processes(workers) as pool:
        read = list(tqdm(pool.map(_read, paths), total=len(paths), desc="signatures", unit="file"))
    texts = [text for file, *_ in read for text in file]
    qualities = [quality for *_, file, _ in read for quality in file]
    judged = verdicts(texts, np.concatenate([file for _, file, *_ in read]), qualities, keep)
    ends = np.cumsum([len(file) for file, *_ in read])
    for path, part in zip(paths, np.split(judged, ends[:-1]), strict=True):
        np.save(os.path.join(out, f"{os.path.basename(path)}.verdicts.npy"), part)
    return functools.partial(apply, out, {path: seconds for path, (*_, seconds) in zip(paths, read, strict=True)})


def apply(out, seconds, documents, counts, source):
    """The step: drop what the plan judged a duplicate, tell the others how often they occurred. seconds: of reading for the plan."""
    counts["seconds"] += seconds[source]
    judged = np.load(os.path.join(out, f"{os.path.basename(source)}.verdicts.npy"))
    for document, verdict in zip(documents, judged.tolist(), strict=True):
        if verdict > 0:
            yield {**document, "occurrences": verdict}
        else:
            counts["removed: exact duplicate" if verdict == EXACT else "removed: near duplicate"] += 1
