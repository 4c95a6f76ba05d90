"""data/: extraction, duplicates, and the chain that runs the steps: planted noise, kills, bad input."""

import gzip
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
import zlib
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

from data import chain, dedup, filters, langid, market, noise, quality, reader, shards
from data.download import download
from data.extract import decode_html, documents_of, html_to_text, read_warc
from tokenizer import Tokenizer, train_bpe
from train import Tokenised, TokenRows

PAGE = """<html><head><title>x</title><style>p {color: red}</style></head><body><nav>Home | Cart</nav>
<h1>Baju  kurung</h1><p>Harga <b>RM45</b>,<br>stok 3 &amp; lagi</p><script>if (a < b) { track() }</script>
<table><tr><td>Warna</td><td>biru</td></tr></table><footer>(c)</footer></body></html>"""


def test_a_page_becomes_what_a_reader_sees():
    assert html_to_text(PAGE) == "Baju kurung\nHarga RM45,\nstok 3 & lagi\nWarna biru"
    assert html_to_text("<head><title>never closed<body>text") == "text"
    assert html_to_text("<head><title>no body either</title><p>text") == "text"
    assert html_to_text("<head><noscript><div>x</div>Enable</noscript><title>Shop</title></head><body>text") == "text"
    assert html_to_text("") == "" and html_to_text("no tags < 5") == "no tags < 5"
    assert html_to_text("<p>a &lt; b</p> c &amp; d <a href='x") == "a < b\nc & d"  # torn in a tag
    assert html_to_text("<dl><dt>Warna<dd>biru</dl><main>y</main><header>z</header>q") == "Warna\nbiru\ny\nz\nq"
    assert html_to_text("<body><form id=aspnetForm><p>whole page <button>Buy</button></form>") == "whole page"
    assert html_to_text("<pre>def f(a):\n\n    if  a:\n\treturn a </pre> a  b") == "def f(a):\n    if  a:\n    return a\na b"
    assert [html_to_text(f"<p>good{odd} page") for odd in ("<![foo[x]]>", "<![]>")] == ["good page"] * 2


def test_charsets():
    assert decode_html("สี".encode("tis-620"), "tis-620") == "สี"
    assert decode_html(b'<meta charset="gb2312">' + "红".encode("gb2312")).endswith("红")
    assert all(decode_html(b'<meta charset="%s">red' % name).endswith("red") for name in (b"none-such", b"idna", b"undefined"))
    assert decode_html("é".encode(), "no-such-charset") == "é"
    # what pages call their charset is not what Python does
    names = {"windows-874": "cp874", "gb2312": "gb18030", "x-gbk": "gbk", "ISO-8859-1": "cp1252", "Shift_JIS": "cp932", "big5": "big5hkscs"}
    texts = "“สวัสดี”", "朱镕基", "朱镕基", "it’s café", "①髙", "嘅"
    assert [decode_html(text.encode(codec), name) for text, (name, codec) in zip(texts, names.items(), strict=True)] == [*texts]
    assert decode_html("\ufeffcafé".encode(), "iso-8859-1") == "café"  # the mark knows better than the header
    assert decode_html(b"a +2D0- b", "utf-7") == "a ? b"  # half of a surrogate pair
    assert decode_html("สี".encode("utf-16"), "utf-8") == decode_html(b"\xfe\xff" + "สี".encode("utf-16-be")) == "สี"


def warc_record(body, kind="response", uri="http://a.example/"):
    header = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {uri}\r\nContent-Length: {len(body)}\r\n\r\n"
    return header.encode() + body + b"\r\n\r\n"


def test_warc_keeps_html_responses(tmp_path):
    page = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n" + PAGE.encode()
    image = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n\x89PNG"
    (tmp_path / "a.warc.wet").write_bytes(warc_record(b"teks biasa", "conversion\r\nContent-Type: text/plain"))
    assert list(read_warc(str(tmp_path / "a.warc.wet"))) == [("http://a.example/", "teks biasa")]
    records = warc_record(b"software: x", "warcinfo") + warc_record(page) + warc_record(image) + warc_record(page, uri="http://b.example/")
    for name, content in (("a.warc", records), ("b.warc.gz", gzip.compress(records))):
        (tmp_path / name).write_bytes(content)
        assert [url for url, _ in read_warc(str(tmp_path / name))] == ["http://a.example/", "http://b.example/"]
    head, raw = page.split(b"\r\n\r\n", 1)
    packed, plain = gzip.compress(raw), b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8"
    chunks = b"".join(b"%x;x=y\r\n%s\r\n" % (len(raw[i : i + 50]), raw[i : i + 50]) for i in range(0, len(raw), 50)) + b"0\r\n\r\n"
    bare, half = zlib.compressobj(wbits=-15), len(raw) // 2
    bodies = {
        "Transfer-Encoding: chunked": chunks, "Content-Encoding: gzip": packed, "content-encoding: deflate": zlib.compress(raw),
        "Content-Encoding:deflate": bare.compress(raw) + bare.flush(), "X: no word of it": packed + b"\r\n",
        "Content-encoding: gzip": gzip.compress(raw[:half]) + gzip.compress(raw[half:]),
        "Content-Encoding:  gzip": raw, "Transfer-Encoding:  chunked": raw,  # undone by the crawler, which kept the head
    }  # fmt: skip
    responses = [b"%s\r\n%s\r\n\r\n%s" % (plain, name.encode(), body) for name, body in bodies.items()]
    noise = random.Random(0).randbytes(5000)
    nothing = {"Content-Encoding: br": noise, "Content-Encoding: gzip": packed[:-20], "Transfer-Encoding: chunked": b"0\r\n\r\n"}
    unreadable = [b"%s\r\n%s\r\n\r\n%s" % (plain, name.encode(), body) for name, body in nothing.items()]
    (tmp_path / "d.warc").write_bytes(b"".join(map(warc_record, [*responses, *unreadable, page.replace(b"200 OK", b"404 Not Found")])))
    assert [text for _, text in read_warc(str(tmp_path / "d.warc"))] == [html_to_text(PAGE)] * len(responses) + [""] * 3
    for size in (b"\xc2\xb2", b"9" * 25, b"-1", b"9" * 12):
        content = b"WARC/1.0\r\nContent-Length: %s\r\n\r\n" % size
        for name, written in (("e.warc", content), ("e.warc.gz", gzip.compress(content))):
            (tmp_path / name).write_bytes(written)
            with pytest.raises(ValueError, match=f"{name}: record 1 (has no Content-Length|is cut short)"):
                list(read_warc(str(tmp_path / name)))
    (tmp_path / "c.warc").write_bytes(records[:-200])
    with pytest.raises(ValueError, match="c.warc: record 4 is cut short"):
        list(read_warc(str(tmp_path / "c.warc")))


def test_minhash_estimates_the_jaccard_index():
    rng = random.Random(0)
    words = [f"w{i}" for i in range(400)]
    for changed in (0, 10, 40, 200):
        other = list(words)
        for i in rng.sample(range(400), changed):
            other[i] = f"x{i}"
        a, b = set(dedup.shingles(" ".join(words)).tolist()), set(dedup.shingles(" ".join(other)).tolist())
        true = len(a & b) / len(a | b)
        estimate = np.mean(dedup.signature(" ".join(words)) == dedup.signature(" ".join(other)))
        assert abs(estimate - true) <= 4 * (true * (1 - true) / dedup.P) ** 0.5 + 1e-9


def planted(seed, originals=150):
    """(documents, ids of planted near duplicates, of planted exact ones): catalogues, some with a few words changed."""
    rng = random.Random(seed)
    documents, near, exact = [], set(), set()
    for i in range(originals):
        text = market.shop_document(market.LANGUAGES[i % 8], rng, "train", 6)
        documents.append({"text": text, "id": i})
        if i % 5 == 0:
            exact.add(1000 + i)
            documents.append({"text": text, "id": 1000 + i})
        if i % 3 == 0:
            near.add(2000 + i)
            documents.append({"text": text + "\nhttps://shop.example/" + str(i), "id": 2000 + i})
    rng.shuffle(documents)
    return documents, near, exact


def write(folder, documents, files=3):
    folder.mkdir(parents=True)
    for k in range(files):
        lines = "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in documents[k::files])
        (folder / f"part{k}.jsonl").write_text(lines, encoding="utf-8")


def read(folder):
    names = sorted(name for name in os.listdir(folder) if name.endswith(".jsonl"))
    return [json.loads(line) for name in names for line in open(folder / name, encoding="utf-8")]


def test_dedup_finds_what_was_planted(tmp_path, script):
    documents, near, exact = planted(0)
    write(tmp_path / "in", documents)
    result = script("-m", "data.chain", "--step", "dedup", "--data", tmp_path / "in", "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    kept = read(tmp_path / "out")
    assert len({d["id"] % 1000 for d in kept}) == 150, "an original was lost"
    assert len(kept) == 150, "a planted duplicate stayed"
    assert sum(d["occurrences"] for d in kept) == len(documents)
    report = json.load(open(tmp_path / "out" / "report.json"))
    assert report["removed: exact duplicate"] >= 1 and report["removed: near duplicate"] >= 1
    assert report["documents in"] - report["documents out"] == len(near | exact)


def test_the_seconds_of_dedup_have_its_signatures_in_them(tmp_path):
    write(tmp_path / "in", planted(0, originals=20)[0], files=2)
    paths = list(chain.files_of(tmp_path / "in").values())
    (tmp_path / "out").mkdir()
    step = dedup.plan(paths, tmp_path / "out", workers=1)
    signatures = sum(step.args[1].values())
    assert chain.run("dedup", step, tmp_path / "in", tmp_path / "out", 1)["seconds"] > signatures > 0


SENTENCES = {
    "en": "The parcel arrived two days later than promised.", "zh": "快递比预计的时间晚了两天才到。",
    "id": "Paketnya baru sampai karena kurirnya bisa dihubungi.", "pt": "A encomenda chegou dois dias depois do prometido.",
    "tl": "Dumating ang padala dalawang araw matapos ang ipinangako.", "th": "พัสดุมาถึงช้ากว่าที่บอกไว้สองวัน",
    "vi": "Gói hàng đến muộn hai ngày so với lời hứa.", "nl": "Het pakket kwam twee dagen later aan dan beloofd.",
    "fr": "Le colis est arrivé deux jours plus tard que promis.", "de": "Das Paket kam zwei Tage später an als versprochen.",
    "el": "Το δέμα έφτασε δύο μέρες αργότερα.", "it": "Il pacco è arrivato due giorni più tardi del previsto.",
    "pl": "Paczka przyszła dwa dni później niż obiecano.", "ru": "Посылка пришла на два дня позже, чем обещали.",
    "es": "El paquete llegó dos días más tarde de lo prometido.", "uk": "Посилка прийшла на два дні пізніше, ніж обіцяли.",
}  # fmt: skip


def test_sentences_of_sixteen_languages_are_told_apart():
    assert {lang: langid.identify(sentence)[0] for lang, sentence in SENTENCES.items()} == {lang: lang for lang in SENTENCES}
    assert langid.identify("12 + 30 = 42 !") == (None, 0.0)


def test_unclear_sentences_have_no_say_in_a_document_s_language(monkeypatch):
    found = {"Sure.": ("en", 0.9), "Surely not this.": ("ms", 0.59), "Selamat pagi.": ("id", 0.6)}
    monkeypatch.setattr(langid, "identify", lambda sentence: found[sentence])
    assert langid.document_language("Sure. Surely not this.") == ("en", 1.0)
    assert langid.document_language("Surely not this.") == (None, 0.0)
    assert langid.document_language("Sure. Selamat pagi.") == ("id", 13 / 18)
    assert langid.document_language("Sure. Surely not this.", least=0.5)[0] == "ms"


def test_langid_mends_labels_and_drops_what_has_no_language(tmp_path, script):
    mixed = "\n".join(SENTENCES[lang] for lang in ("en", "th", "ru", "vi"))
    documents = [{"text": SENTENCES["de"], "lang": "nl"}, {"text": SENTENCES["id"], "lang": "ms"}, {"text": SENTENCES["th"]}]
    documents += [{"text": "404 :: 17-03-2024"}, {"text": mixed}]
    write(tmp_path / "in", documents, files=1)
    result = script("-m", "data.chain", "--step", "langid", "--data", tmp_path / "in", "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert [d["lang"] for d in read(tmp_path / "out")] == ["de", "ms", "th"]
    report = json.load(open(tmp_path / "out" / "report.json"))
    assert report["relabelled"] == report["removed: no clear language"] == report["removed: mixed languages"] == 1


def test_a_table_can_be_trained():
    documents = [{"text": text * 3, "lang": lang} for lang, text in SENTENCES.items()]
    languages, table_BL, scale = langid.train(documents, steps=30, batch=32)
    assert languages == sorted(SENTENCES) and table_BL.shape == (langid.BUCKETS, 16) and scale > 0
    scores = {lang: table_BL[langid.features(text)].astype(float).mean(0).argmax() for lang, text in SENTENCES.items()}
    assert all(languages[best] == lang for lang, best in scores.items())


def test_good_repeats_stay_up_to_the_limit():
    signatures = np.stack([dedup.signature("one and the same text of nine short words")] * 6 + [dedup.signature("another")])
    texts = [b"a"] * 4 + [b"b"] * 2 + [b"c"]
    quality = [0.9, 0.9, 0.1, 0.9, 0.9, 0.9, 0.0]
    assert dedup.verdicts(texts, signatures, quality, keep=1).tolist() == [6, 0, 0, 0, -1, 0, 1]
    verdicts = dedup.verdicts(texts, signatures, quality, keep=3)
    assert verdicts.tolist() == [6, 1, 0, 1, -1, 0, 1]


def test_a_step_that_lets_nothing_through_is_reported(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "th.jsonl").write_text('{"text": "short"}')
    for name, step, source in (("filter", filters.step, "in"), ("quality", quality.step, "1-filter")):
        out = tmp_path / f"{1 if source == 'in' else 2}-{name}"
        out.mkdir()
        chain.run(name, step, tmp_path / source, out, 1)
    table = chain.write_report(tmp_path, tmp_path)
    assert "| filter | 1 | 0 |" in table and "| quality | 0 | 0 |" in table and (tmp_path / "chain.png").stat().st_size > 5000


def test_a_killed_step_goes_on_to_the_same_bytes(tmp_path, script):
    write(tmp_path / "in", planted(1)[0])
    command = ("-m", "data.chain", "--step", "dedup", "--data", tmp_path / "in")
    for out in ("whole", "killed"):
        assert script(*command, "--out", tmp_path / out).returncode == 0
    finished = os.stat(tmp_path / "killed" / "part0.jsonl").st_mtime_ns
    os.remove(tmp_path / "killed" / "part1.jsonl")  # as if the kill came while part1 was being written
    (tmp_path / "killed" / "part1.jsonl.part").write_text('{"text": "half a li')
    assert script(*command, "--out", tmp_path / "killed").returncode == 0
    for k in range(3):
        assert (tmp_path / "whole" / f"part{k}.jsonl").read_bytes() == (tmp_path / "killed" / f"part{k}.jsonl").read_bytes()
    assert os.stat(tmp_path / "killed" / "part0.jsonl").st_mtime_ns == finished  # not done again
    (tmp_path / "killed" / "part1.jsonl.counts").write_text("")  # as a power cut may leave it
    again = script(*command, "--out", tmp_path / "killed")
    assert again.returncode == 2 and "part1.jsonl.counts: damaged" in again.stderr and "Traceback" not in again.stderr


def test_workers_end_with_the_process_that_began_them(tmp_path):
    code = """
import sys, time
from data.extract import processes

def work(path):
    while True:
        with open(path, "a") as file:
            file.write("x")
        time.sleep(0.02)

processes(1).submit(work, sys.argv[1]).result()
"""
    parent, log = subprocess.Popen([sys.executable, "-c", code, tmp_path / "log"], cwd=ROOT), tmp_path / "log"
    while not log.exists():
        assert parent.poll() is None
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    time.sleep(2)
    written = log.stat().st_size
    time.sleep(1)
    assert log.stat().st_size == written


def test_extract_reads_every_format(tmp_path, script):
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.txt").write_text("plain text")
    (source / "b.html").write_text(PAGE)
    (source / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed", "lang": "en"}\n{"text": " "}\n'))
    result = script("-m", "data.chain", "--step", "extract", "--data", source, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert [d["text"][:6] for d in read(tmp_path / "out")] == ["plain ", "Baju k", "packed"]
    assert json.load(open(tmp_path / "out" / "report.json"))["removed: empty"] == 1


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("bad.jsonl", b'{"text": "ok"}\n{"text": 3}\n', 'bad.jsonl:2: field "text"'),
        ("bad.warc", b"not a warc\n", "bad.warc: record 1 does not begin with WARC/"),
        ("bad.pdf", b"%PDF", "holds no file ending in"),
        ("torn.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99)[:-9], "torn.jsonl.gz: damaged gzip file"),
        ("torn.warc.gz", b"no gzip", "torn.warc.gz: damaged gzip file"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(tmp_path, script, name, content, message):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    result = script("-m", "data.chain", "--step", "extract", "--data", tmp_path / "in", "--out", tmp_path / "out")
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
    assert not [f for f in (os.listdir(tmp_path / "out") if (tmp_path / "out").exists() else []) if f.endswith(".jsonl")]
    os.remove(tmp_path / "in" / name)  # mended, the same command works
    (tmp_path / "in" / "good.txt").write_text("a good text")
    assert script("-m", "data.chain", "--step", "extract", "--data", tmp_path / "in", "--out", tmp_path / "out").returncode == 0


def test_one_bad_file_among_good_ones_is_mended(tmp_path, script):
    """What was finished before the fault stays; what was finished and is another now is refused."""
    source, command = tmp_path / "in", ("-m", "data.chain", "--step", "extract", "--data", tmp_path / "in", "--out", tmp_path / "out")
    write(source, [{"text": "one"}], files=1)
    (source / "z.jsonl").write_text('{"text": 3}')
    (source / "B.TXT").write_text("two")
    (source / "x.pdf").write_text("three")
    for _ in range(2):
        failed = script(*command)
        assert failed.returncode == 2 and 'z.jsonl:1: field "text"' in failed.stderr
        assert "in: files and folders that are not read: 1 (x.pdf)" in failed.stdout
    (source / "z.jsonl").write_text('{"text": "a long one"}')
    assert script(*command).returncode == 0 and [d["text"] for d in read(tmp_path / "out")] == ["two", "one", "a long one"]
    (source / "z.jsonl").write_text('{"text": "another!!"}')  # as long as before
    refused = script(*command)
    assert refused.returncode == 2 and "or other input; choose another folder" in refused.stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "z.jsonl").write_text('{"text": "not the chain\'s"}')
    refused = script(*command[:-1], tmp_path / "mine")
    assert refused.returncode == 2 and sorted(os.listdir(tmp_path / "mine")) == ["z.jsonl"]


def test_two_files_of_one_name_are_refused(tmp_path):
    write(tmp_path / "in", [{"text": "one"}], files=1)
    (tmp_path / "in" / "part0.jsonl.gz").write_bytes(gzip.compress(b'{"text": "two"}'))
    with pytest.raises(ValueError, match="part0.jsonl and part0.jsonl.gz would both become part0.jsonl: rename one"):
        chain.run("extract", chain.keep_nonempty, tmp_path / "in", tmp_path / "out", 1)


def test_what_the_chain_left_empty_is_no_fault(tmp_path, capsys):
    folder = tmp_path / "6-resample"
    write(folder, [{"text": "one", "lang": None}], files=2)  # part1.jsonl is empty
    (folder / "part0.jsonl.counts").write_text("{}")
    assert [d["text"] for d in reader.read_folder(folder)] == ["one"]
    assert capsys.readouterr().out == f"{folder}: files that are empty: 1 (part1.jsonl)\n"
    (folder / "part1.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "two"}')  # begins with a byte order mark
    assert [d["text"] for d in reader.read_folder(folder)] == ["one", "two"]


def test_a_label_that_is_no_language_goes(tmp_path):
    code = market.code_document(random.Random(0))
    kept = list(langid.step([{"text": code, "lang": "python"}, {"text": code, "lang": "en"}], Counter(), ""))
    assert [d["lang"] for d in kept] == [None, "en"]


def test_an_output_folder_belongs_to_one_step(tmp_path, script):
    write(tmp_path / "in", planted(2, 10)[0])
    command = ("-m", "data.chain", "--data", tmp_path / "in", "--out", tmp_path / "out")
    assert script(*command, "--step", "extract").returncode == 0
    result = script(*command, "--step", "dedup")
    assert result.returncode == 2 and "holds the output of another step" in result.stderr
    (tmp_path / "in" / "more.txt").write_text("a new document")
    assert script(*command, "--step", "extract").returncode == 2
    none = script("-m", "data.chain", "--step", "dedup", "--data", tmp_path / "in", "--out", tmp_path / "new", "--keep", 0)
    assert none.returncode == 2 and "--keep is 0" in none.stderr
    same = script("-m", "data.chain", "--step", "dedup", "--data", tmp_path / "in", "--out", tmp_path / "in")
    assert same.returncode == 2 and "cannot write into the folder that it reads" in same.stderr


KINDS = ("page", "review", "chat", "faq")
NOISE = {  # what crawls are full of; each kind must go
    "too short": lambda text, rng: "Buy now",
    "few letters": lambda text, rng: "★★★ $$$ 99% >>> " * 6 + "sale now on here ok",
    "broken encoding": lambda text, rng: text.encode().decode("latin-1"),
    "links": lambda text, rng: " ".join(f"cheap {word} https://{word}.example/{rng.randint(1, 99)}" for word in "abcdef"),
    "repeated lines": lambda text, rng: "\n".join([text.split("\n")[0] + " best price in town"] * 5),
    "repeated words": lambda text, rng: "best cheap price " * 12 + text.split("\n")[0],
}


def test_filters_on_planted_noise():
    """Every planted fault is found and named; of clean documents of every kind and language 99 % stay."""
    rng = random.Random(0)
    clean = [market.document(lang, rng, "train", kind) for lang in market.LANGUAGES for kind in KINDS for _ in range(25)]
    stayed = [filters.fault_of_prose(text) is None for text in clean]
    assert np.mean(stayed) >= 0.99, [text for text, ok in zip(clean, stayed, strict=True) if not ok][:3]
    for fault, spoil in NOISE.items():
        for text in (market.document(lang, rng, "train", "review") for lang in ("zh", "th", "vi") * 20):
            assert filters.fault_of_prose(spoil(text, rng)) == fault


def test_code_and_maths_have_their_own_rules():
    rng = random.Random(0)
    code, maths = market.code_document(rng), market.maths_document(rng, "train")
    assert filters.kind_of({"text": code}) == "code" and filters.kind_of({"text": maths}) == "maths"
    documents = [{"text": code}, {"text": maths}, {"text": "x" * 2000, "kind": "code"}, {"text": "no digits here", "kind": "maths"}]
    documents += [{"text": "# generated by a tool, do not edit\n" + code}, {"text": " \n", "kind": "code"}]
    counts = Counter()
    assert [d["text"] for d in filters.step(documents, counts, "")] == [code, maths]
    assert counts == {"removed: code, minified": 1, "removed: maths, no maths": 1, "removed: code, generated": 1, "removed: code, empty": 1}


def test_words_and_encodings_of_mixed_scripts():
    mixed = "3月15日我们去了北京。2024年的夏天特别热，iPhone15手机壳防摔又好看，5G网络很快。"
    assert filters.WORD.findall(mixed)[:5] == ["3", "月", "15", "日", "我"] and filters.fault_of_prose(mixed) is None
    assert len(dedup.shingles("网络5G很快!我")) == 2  # six words, 5g one of them: two runs of five
    signs = [dedup.signature(text) for text in ("★★★ ☆☆☆ !!!", "--> ### <--", "🙂🙃😉")]
    assert len({tuple(signature) for signature in signs}) == 3  # no words, and yet not the same
    assert filters.fault_of_prose("Elle a dit à « Paul » que la soirée était « formidable ».") is None
    assert filters.fault_of_prose("Elle a dit que la soirée était formidable.".encode().decode("latin-1")) == "broken encoding"


def test_boilerplate_lines_are_cut_not_documents():
    text = "Velora A1 shirt\nWe use cookies to improve this site.\nMade of cotton and sent from Penang.\n© 2024 All rights reserved"
    counts = Counter()
    (kept,) = filters.step([{"text": text}], counts, "")
    assert kept["text"] == "Velora A1 shirt\nMade of cotton and sent from Penang." and counts["boilerplate lines cut"] == 2
    assert not list(filters.step([{"text": "All rights reserved\nlog in"}], counts, "")) and counts["boilerplate lines cut"] == 4
    wrapped = "She had come to value, over a long winter, the\nprivacy of the small room above the shop, where nobody came,\nand the quiet."
    assert filters.without_boilerplate(wrapped + "\nPrivacy policy and cookies\nlog in\n\nThe end") == wrapped + "\n\nThe end"


def test_a_judge_needs_good_documents(tmp_path, monkeypatch):
    (tmp_path / "empty.jsonl").write_text('{"text": " "}\n')
    monkeypatch.setattr(quality, "PATH", str(tmp_path / "judge.json"))
    monkeypatch.setattr("sys.argv", ["quality", "--good", str(tmp_path)])
    with pytest.raises(ValueError, match="all documents are empty"):
        quality.main()
    assert not os.path.exists(quality.PATH)


def test_quality_tells_clean_from_spoilt_prose():
    made = list(noise.documents(7, per_language=250))
    clean = np.array([quality.quality(d["text"]) for d in made if d["fault"] is None and d["kind"] == "prose"])
    spoilt = np.array([quality.quality(d["text"]) for d in made if d["fault"] in ("spam", "symbols", "too short", "broken encoding")])
    assert (clean[:, None] > spoilt).mean() > 0.97 and np.median(spoilt) < 0.2 < 0.5 < np.median(clean)
    assert all(0 <= quality.quality(text) <= 1 for text in ("", "?", "a", "\n\n", "x" * 100_000))


def test_a_judge_can_be_trained_on_ones_own_taste():
    long, short = ["One two three. Four five six! " * 20] * 5, ["one two"] * 5
    judge = quality.train(short, long, steps=200)  # upside down
    assert quality.quality(short[0], judge) > 0.9 > 0.1 > quality.quality(long[0], judge)


def test_resampling_by_hand():
    document = {"text": "t", "quality": 0.5, "occurrences": 4}
    assert quality.copies(document) == 2 and quality.copies({"text": "t"}) == 1
    assert quality.copies({**document, "occurrences": 100}) == quality.MOST
    drawn = [quality.copies({"text": str(i), "quality": 0.25, "occurrences": 5}) for i in range(4000)]  # 1.25 expected
    assert set(drawn) == {1, 2} and abs(np.mean(drawn) - 1.25) < 0.03
    counts = Counter()
    documents = [{"text": str(i), "quality": 0.1} for i in range(200)] + [{**document, "text": "four"}]
    assert len(list(quality.resample(documents, counts, ""))) == 201 - counts["removed: resampled away"] + counts["copies added"]


def test_the_whole_chain_on_planted_noise(tmp_path):
    """bash data/chain.sh: what is planted goes, what is clean stays, every step says what it did."""
    made = list(noise.documents(3, per_language=60))
    write(tmp_path / "crawl", made, files=1)
    path = os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"]))
    command = ["bash", "data/chain.sh", str(tmp_path / "crawl"), str(tmp_path / "corpus")]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    left = {d["id"]: d for d in read(tmp_path / "corpus" / "5-dedup")}
    clean = [d for d in made if d["fault"] is None]
    assert np.mean([d["id"] in left for d in clean]) > 0.98
    gone = ("exact duplicate", "near duplicate", "spam", "broken encoding", "too short", "symbols", "minified code", "generated code")
    missed = Counter(d["fault"] for d in made if d["fault"] in gone and d["id"] in left)
    planted = Counter(d["fault"] for d in made if d["fault"] in gone)
    assert sum(missed.values()) <= 0.08 * sum(planted.values()) and all(missed[fault] <= 0.3 * planted[fault] for fault in gone), missed
    assert all(left[d["id"]]["lang"] != d["lang"] for d in made if d["fault"] == "wrong language" and d["id"] in left)
    lines = {line for lang in market.LANGUAGES for line in market.lexicon(lang)["boilerplate"]}
    assert not [line for d in left.values() for line in d["text"].split("\n") if line in lines]
    assert all(0 <= d["quality"] <= 1 and d["occurrences"] >= 1 for d in left.values())
    table = (tmp_path / "corpus" / "chain.md").read_text()
    assert all(f"| {step} |" in table for step in ("extract", "langid", "filter", "quality", "dedup", "resample"))
    assert (tmp_path / "corpus" / "chain.png").stat().st_size > 5000


def test_shards_are_the_same_rows_as_documents_in_memory(tmp_path, micro_tokenizer):
    micro_tokenizer.save(str(tmp_path / "run"))
    documents = list(market.documents("general", 3, per_language=10))
    assert any(reader.held_out(document["text"]) for document in documents)
    write(tmp_path / "in", documents)
    index = shards.write_shards(str(tmp_path / "in"), str(tmp_path / "out"), str(tmp_path / "run"))
    mapped = shards.Shards(str(tmp_path / "out"), micro_tokenizer)
    kept = [d for name in ("part0", "part1", "part2") for d in documents[int(name[-1]) :: 3] if not reader.held_out(d["text"])]
    memory = Tokenised(kept, micro_tokenizer)
    assert sum(s["tokens"] for s in index["shards"]) == memory.lengths.sum() and np.array_equal(mapped.lengths, memory.lengths)
    a, b = TokenRows(mapped, 64, 1), TokenRows(memory, 64, 1)
    for i in range(a.rows_per_epoch + 2):
        assert all(np.array_equal(x[0], y[0]) for x, y in zip(a.row(i), b.row(i), strict=True))


def test_more_shards_than_a_process_may_hold_files(tmp_path, micro_tokenizer, monkeypatch):
    micro_tokenizer.save(str(tmp_path / "run"))
    texts = [f"Document {i} of a page a file." for i in range(300)]
    (tmp_path / "in").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "in" / f"{i:03}.txt").write_text(text)
    shards.write_shards(str(tmp_path / "in"), str(tmp_path / "out"), str(tmp_path / "run"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (280, hard))
    try:
        mapped = shards.Shards(str(tmp_path / "out"), micro_tokenizer)
        read = [micro_tokenizer.decode(mapped.document(i)[:-1].tolist()) for i in range(len(mapped.lengths))]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(read) > 270 and read == [text for text in texts if not reader.held_out(text)]


def test_shards_refuse_what_does_not_belong(tmp_path, micro_tokenizer, script):
    micro_tokenizer.save(str(tmp_path / "run"))
    write(tmp_path / "in", list(market.documents("general", 3, per_language=2)))
    command = ("-m", "data.shards", "--data", tmp_path / "in", "--run", tmp_path / "run", "--out", tmp_path / "out")
    with open(tmp_path / "in" / "part1.jsonl", "a", encoding="utf-8") as file:
        file.write('{"text": " "}\n')
    first = script(*command)
    assert first.returncode == 0 and "part1.jsonl: 1 blank documents left out" in first.stdout, first.stderr
    before = (tmp_path / "out" / "part1.jsonl.tokens").read_bytes()
    os.remove(tmp_path / "out" / "part1.jsonl.ends")  # as if killed there
    assert script(*command).returncode == 0 and (tmp_path / "out" / "part1.jsonl.tokens").read_bytes() == before
    with pytest.raises(ValueError, match="shards of another tokenizer"):
        shards.Shards(str(tmp_path / "out"), Tokenizer(train_bpe(["abc"], 256)))
    (tmp_path / "out" / "part1.jsonl.tokens").write_bytes(before[:-4])
    with pytest.raises(ValueError, match=r"part1.jsonl.tokens: \d+ bytes, expected \d+"):
        shards.Shards(str(tmp_path / "out"), micro_tokenizer)
    (tmp_path / "out" / "part1.jsonl.tokens").write_bytes(before)
    (tmp_path / "out" / "part1.jsonl.tokens").write_bytes(b"\xff\xff\0\0" + before[4:])
    damaged = shards.Shards(str(tmp_path / "out"), micro_tokenizer)
    with pytest.raises(ValueError, match=rf"part1.jsonl.tokens: document 1 holds token 65535 of {micro_tokenizer.n_vocab} "):
        damaged.document(damaged.first[1])
    (tmp_path / "out" / "part1.jsonl.tokens").write_bytes(before)
    ends = (tmp_path / "out" / "part1.jsonl.ends").read_bytes()
    (tmp_path / "out" / "part1.jsonl.ends").write_bytes(ends[:-8])
    with pytest.raises(ValueError, match=r"part1.jsonl.ends: does not fit shards.json"):
        shards.Shards(str(tmp_path / "out"), micro_tokenizer)
    for damaged in ("{", "[]", '{"tokenizer_hash": "x", "shards": [{}]}'):
        (tmp_path / "out" / "shards.json").write_text(damaged)
        with pytest.raises(ValueError, match="shards.json: not what `python -m data.shards` wrote"):
            shards.Shards(str(tmp_path / "out"), micro_tokenizer)
    os.remove(tmp_path / "out" / "shards.json")
    result = script("train.py", "--data", tmp_path / "out", "--run", tmp_path / "run")
    assert result.returncode == 2 and "the shards are not finished" in result.stderr
    assert shards.is_shards(tmp_path / "out") and not shards.is_shards(None) and not shards.is_shards(tmp_path / "none")
    (tmp_path / "chain").mkdir()
    (tmp_path / "chain" / "settings.json").write_text("{}")  # as a step of the corpus chain leaves it beside its documents
    assert not shards.is_shards(tmp_path / "chain")


@pytest.mark.parametrize("content", ["// comments\n{}", "[]", "{}"])
def test_a_foreign_settings_file_is_left_alone(content, tmp_path):
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(ValueError, match="settings.json: damaged, or not written by the corpus chain"):
        chain.claim(str(tmp_path), [], step="filter")
    assert (tmp_path / "settings.json").read_text() == content


def test_a_damaged_report_is_named(tmp_path):
    (tmp_path / "1-extract").mkdir()
    (tmp_path / "1-extract" / "report.json").write_text('{"step": ')
    with pytest.raises(ValueError, match="1-extract/report.json: damaged"):
        chain.report_of(str(tmp_path))


def test_a_name_that_is_not_utf8_is_shown_and_kept(tmp_path, capsys):
    for name in (b"caf\xe9.txt", b"caf\xe9.pdf"):
        with open(os.path.join(os.fsencode(tmp_path), name), "w") as file:
            file.write("coffee")
    (document,) = documents_of(os.path.join(tmp_path, os.fsdecode(b"caf\xe9.txt")))
    assert document == {"text": "coffee", "source": "caf\ufffd"} and json.dumps(document, ensure_ascii=False).encode()
    reader.say_unread(str(tmp_path), [os.fsdecode(b"caf\xe9.txt")])
    assert "not read: 1 (caf\ufffd.pdf)" in capsys.readouterr().out


@pytest.mark.parametrize("agree,joined", [(84, False), (91, True)])  # of 112 values: 0.75 and 0.81
def test_candidates_are_duplicates_from_the_threshold_on(agree, joined):
    signatures = np.random.default_rng(0).integers(0, 1 << 31, (2, dedup.P), dtype=np.uint32)
    signatures[1, :agree] = signatures[0, :agree]
    assert (dedup.near_duplicates(signatures).find(1) == 0) == joined


def test_duplicates_among_many_pages_of_one_template():
    """300 pages that share a band and little else, each there twice: more groups than all are compared with, and every copy is found."""
    signatures = np.random.default_rng(0).integers(0, 1 << 31, (300, dedup.P), dtype=np.uint32)
    signatures[:, : dedup.R] = 7
    clusters = dedup.near_duplicates(np.concatenate((signatures, signatures)))
    assert [clusters.find(i) for i in range(600)] == [*range(300), *range(300)]


def test_download_from_the_hub(tmp_path, monkeypatch):
    import huggingface_hub as hub

    (tmp_path / "cached").write_bytes(b"12345")
    entries = [SimpleNamespace(path="data"), SimpleNamespace(path="data/a.parquet", size=5), SimpleNamespace(path="data/b.parquet", size=5)]
    monkeypatch.setattr(hub.HfApi, "list_repo_tree", lambda self, name, recursive, repo_type: entries)

    def fetched(dataset, name, repo_type):
        if name == "data/b.parquet":
            raise ConnectionError("no network")
        return tmp_path / "cached"

    monkeypatch.setattr(hub, "hf_hub_download", fetched)
    out = str(tmp_path / "out")
    assert download("some/set", "data/a*", out) == [f"{out}/data_a.parquet"]
    with pytest.raises(ValueError, match="some/set: the hub does not give data/b.parquet .no network"):
        download("some/set", "*", out)
    assert os.listdir(out) == ["data_a.parquet"]
    entries[1].size = 6
    with pytest.raises(ValueError, match="data_a.parquet is there already and is not that of other/set, which has 6 bytes"):
        download("other/set", "*", out)


def test_download_from_a_local_folder_and_parquet(tmp_path, script):
    import pyarrow
    import pyarrow.parquet

    source = tmp_path / "hub" / "data" / "ind_Latn"
    source.mkdir(parents=True)
    for k in range(2):
        rows = {"text": [f"dokumen {k}-{i}" for i in range(1500)] + [None], "url": ["x"] * 1501}
        pyarrow.parquet.write_table(pyarrow.table(rows), source / f"00{k}.parquet")
    (source / "readme.md").write_text("not data")
    command = ("-m", "data.download", "--dataset", tmp_path / "hub", "--match", "data/*/00*.parquet", "--out", tmp_path / "crawl")
    assert script(*command).returncode == 0 and script(*command).returncode == 0
    assert sorted(os.listdir(tmp_path / "crawl")) == ["data_ind_Latn_000.parquet", "data_ind_Latn_001.parquet"]
    assert script("-m", "data.chain", "--step", "extract", "--data", tmp_path / "crawl", "--out", tmp_path / "out").returncode == 0
    assert [d["text"] for d in read(tmp_path / "out")] == [f"dokumen {k}-{i}" for k in range(2) for i in range(1500)]
    assert json.load(open(tmp_path / "out" / "report.json"))["removed: empty"] == 2
    nothing = script(*command[:4], "--match", "*.zip", "--out", tmp_path / "crawl")
    assert nothing.returncode == 2 and "none of 3 files matches '*.zip'" in nothing.stderr
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.parquet").write_bytes(b"PAR1 but torn")
    torn = script("-m", "data.chain", "--step", "extract", "--data", tmp_path / "bad", "--out", tmp_path / "out2")
    assert torn.returncode == 2 and "a.parquet: not a parquet file" in torn.stderr
    latin = pyarrow.Array.from_buffers(pyarrow.string(), 2, pyarrow.array([b"fine", b"caf\xe9"]).buffers())  # not checked by arrow
    pyarrow.parquet.write_table(pyarrow.table({"text": latin}), tmp_path / "bad" / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet: damaged behind row 0 \('utf-8' codec"):
        list(documents_of(str(tmp_path / "bad" / "a.parquet")))
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "bad" / "a.parquet")
    with pytest.raises(ValueError, match='a.parquet: row 1: field "text" is missing or no str'):
        list(documents_of(str(tmp_path / "bad" / "a.parquet")))
    for value in ("null", "NaN", "-1", "2"):
        (tmp_path / "bad" / "b.jsonl").write_text('{"text": "x", "quality": 0.5}\n{"text": "y", "quality": ' + value + "}")
        with pytest.raises(ValueError, match='b.jsonl:2: field "quality" is no number from 0 to 1'):
            list(documents_of(str(tmp_path / "bad" / "b.jsonl")))
    shutil.copytree(tmp_path / "hub", tmp_path / "other")
    (tmp_path / "other" / "data" / "ind_Latn" / "001.parquet").write_bytes(b"of another dataset")
    mixed = script(*command[:3], tmp_path / "other", *command[4:])
    assert mixed.returncode == 2 and "001.parquet is there already and is not that of" in mixed.stderr
    (tmp_path / "hub" / "data" / "ind").mkdir()
    (tmp_path / "hub" / "data" / "ind" / "Latn_000.parquet").write_bytes(b"")
    twice = script(*command[:4], "--match", "*.parquet", "--out", tmp_path / "new")
    assert twice.returncode == 2 and "two files would both become" in twice.stderr and not (tmp_path / "new").exists()
