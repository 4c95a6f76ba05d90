"""Step 1 of the corpus chain: any folder of .txt, .jsonl(.gz), .html, .warc(.gz), .wet(.gz) and .parquet to documents (v2 §2.1.1).

HTML is cut to what a reader sees: scripts, styles, navigation, buttons and menus go, blocks become lines. A WARC is read record by record;
its successful HTML responses are kept, and the texts of a WET. Parquet files need the column "text" (pip install ".[hub]" brings
pyarrow). One output .jsonl for each input file, one {"text", "lang"?, "source"} a line.

    python -m data.chain --step extract --data crawl --out corpus/1-extract
"""

import codecs
import html
import json
import os
import re
import threading
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from html.parser import HTMLParser

from cli import InputError
from data.reader import CODES, files_in, opened, printable, read_jsonl, read_text

ENDINGS = (".txt", ".jsonl", ".jsonl.gz", ".html", ".htm", ".warc", ".warc.gz", ".wet", ".wet.gz", ".parquet")
SKIPPED = {"script", "style", "noscript", "template", "svg", "head", "nav", "footer", "button", "select", "aside", "iframe"}
CHARSETS = {  # what pages mean by these names (encoding.spec.whatwg.org); Python's codecs are narrower or have another name
    **dict.fromkeys(("windows-874", "tis-620", "iso-8859-11"), "cp874"), **dict.fromkeys(("gb2312", "gbk", "x-gbk"), "gb18030"),
    **dict.fromkeys(("iso-8859-1", "latin1", "us-ascii", "ascii"), "cp1252"), **dict.fromkeys(("shift_jis", "x-sjis"), "cp932"),
    "big5": "big5hkscs", "euc-kr": "cp949",
}  # fmt: skip
CHUNK = re.compile(rb"([0-9a-fA-F]+)[ \t]*(?:;[^\r\n]*)?\r\n")
BINARY = re.compile(rb"[\0-\x08\x0e-\x1a\x1c-\x1f]")  # what no page holds and the first kilobyte of a packed one does
BLOCKS = {
    *("p", "div", "br", "hr", "li", "tr", "ul", "ol", "dl", "dt", "dd", "table", "caption", "h1", "h2", "h3", "h4", "h5", "h6", "pre"),
    *("section", "article", "main", "header", "blockquote", "figure", "figcaption", "details", "summary", "address"),
}


class _Text(HTMLParser):
    """Collects the visible text; a skipped element hides all it holds."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.pieces, self.hidden, self.preformatted = [], [], 0

    def handle_starttag(self, tag, attrs):
        if tag == "body" or (tag in BLOCKS and self.hidden == ["head"]):
            self.hidden.clear()  # a <head> that was never closed ends here
        elif self.hidden:
            if tag == self.hidden[-1] or (tag in SKIPPED and self.hidden == ["head"]):
                self.hidden.append(tag)
        elif tag in SKIPPED:
            self.hidden.append(tag)
        self.preformatted += tag == "pre"
        if tag in BLOCKS:
            self.pieces.append("\n")
        elif tag in ("td", "th"):
            self.pieces.append(" ")

    def handle_endtag(self, tag):
        if self.hidden and tag == self.hidden[-1]:
            self.hidden.pop()
        self.preformatted -= tag == "pre" and self.preformatted > 0
        if tag in BLOCKS:
            self.pieces.append("\n")

    def handle_data(self, data):
        if not self.hidden:
            self.pieces.append(data.expandtabs(4).replace(" ", "\0") if self.preformatted else re.sub(r"\s+", " ", data))

    def parse_marked_section(self, i, report=1):
        try:
            return super().parse_marked_section(i, report)
        except AssertionError:  # of <![ and a word that HTMLParser does not know
            return self.parse_bogus_comment(i)


def html_to_text(page):
    """The visible text of an HTML page (str), one block a line; <pre> keeps its lines and their indentation."""
    parser, cut = _Text(), page.rfind(">") + 1
    parser.feed(page[:cut])
    parser.close()
    parser.handle_data(html.unescape(re.split("<[a-zA-Z/!?]", page[cut:])[0]))  # HTMLParser would try every unclosed tag again and again
    lines = (re.sub(" +", " ", line).strip().rstrip("\0") for line in "".join(parser.pieces).split("\n"))
    return "\n".join(line for line in lines if line).replace("\0", " ")  # in <pre> every blank counts


def decode_html(raw, declared=None):
    """Bytes to text that UTF-8 can hold, never fails: by its mark, else the declared charset, the page's <meta charset>, UTF-8."""
    meta = re.search(rb"charset=[\"']?([\w-]+)", raw[:2048])
    name = declared or (meta[1].decode() if meta else "utf-8")
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        name = "utf-16"
    elif raw.startswith(codecs.BOM_UTF8):
        name = "utf-8"
    try:
        text = raw.decode(CHARSETS.get(name.lower(), name), errors="replace")
    except (LookupError, UnicodeError):  # unknown, or one that is no charset of pages, such as idna
        text = raw.decode("utf-8", errors="replace")
    return text.removeprefix("\ufeff").encode("utf-8", errors="replace").decode()  # utf-7 makes halves of surrogate pairs


def _headers(file):
    """{lower-case name: value} of header lines up to the empty one."""
    headers = {}
    for line in iter(file.readline, b""):
        if not line.strip():
            break
        name, _, value = line.decode("utf-8", errors="replace").partition(":")
        headers[name.strip().lower()] = value.strip()
    return headers


def inflated(payload, bits):
    """What the whole members at the beginning of a compressed payload hold; empty where the first is torn or none."""
    whole = []
    while payload:
        member = zlib.decompressobj(bits)
        try:
            part = member.decompress(payload)
        except zlib.error:
            break
        if not member.eof:
            break
        whole.append(part)
        payload = member.unused_data
    return b"".join(whole)


def payload_of(head, payload):
    """The payload of an HTTP response without chunks and compression; as it is where it has neither, whatever its head says (crawlers
    undo both and keep the head); empty where it cannot be unpacked, so that it is counted as empty."""
    if re.search(rb"(?im)^transfer-encoding:.*chunked", head):
        at, parts = 0, []
        while (size := CHUNK.match(payload, at)) and (length := int(size[1], 16)):
            parts.append(payload[size.end() : size.end() + length])
            at = size.end() + length + 2
        payload = b"".join(parts) if parts or size else payload
    coding = re.search(rb"(?im)^content-encoding:\s*([\w-]+)", head)
    coding = coding[1].lower() if coding else b"gzip" if payload[:2] == b"\x1f\x8b" else b"identity"
    if coding in (b"gzip", b"x-gzip", b"deflate"):  # by the header gzip or zlib; deflate often comes without one
        whole = inflated(payload, 47) or (inflated(payload, -15) if coding == b"deflate" else b"")
        if whole:
            return whole
    return b"" if coding != b"identity" and BINARY.search(payload[:1024]) else payload


def read_warc(path):
    """Yield (url, text) of the successful HTML responses and the plain-text conversions (WET) in a .warc or .warc.gz file (ISO 28500)."""
    with opened(path) as file:
        number = 0
        while line := file.readline():
            if not line.strip():
                continue
            number += 1
            if not line.startswith(b"WARC/"):
                raise InputError(f"{path}: record {number} does not begin with WARC/ but with {line[:20]!r}")
            headers = _headers(file)
            if not re.fullmatch("[0-9]{1,12}", headers.get("content-length", "")):
                raise InputError(f"{path}: record {number} has no Content-Length, or none of at most 12 digits")
            length = int(headers["content-length"])
            try:
                body = file.read(length)
            except MemoryError:  # of a length that no file has
                body = b""
            if len(body) < length:
                raise InputError(f"{path}: record {number} is cut short")
            url = headers.get("warc-target-uri", "")
            if headers.get("warc-type") == "conversion" and headers.get("content-type", "").startswith("text/plain"):
                yield url, decode_html(body, "utf-8")
            if headers.get("warc-type") != "response":
                continue
            head, _, payload = body.partition(b"\r\n\r\n")
            kind = re.search(rb"(?im)^content-type:\s*(?:text/html|application/xhtml\+xml)(?:.*charset=\"?([\w-]+))?", head)
            if kind and re.match(rb"HTTP/\S+ 2\d\d", head):
                yield url, html_to_text(decode_html(payload_of(head, payload), kind[1] and kind[1].decode()))


def checked(document, where):
    """The document; raises InputError where a field that the chain reads is of another type."""
    if not isinstance(document.get("text"), str):
        raise InputError(f'{where}: field "text" is missing or no str')
    if not isinstance(document.get("lang", ""), str | None):
        raise InputError(f'{where}: field "lang" is no str')
    for field, most in (("quality", 1), ("occurrences", 1e9)):
        value = document.get(field, 0)
        if not isinstance(value, int | float) or not 0 <= value <= most:
            raise InputError(f'{where}: field "{field}" is no number from 0 to {most:g}')
    return document


def read_parquet(path):
    """Yield {"text", "lang"?, "source"?} of each row, a batch in memory at a time."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError(f'{path}: reading parquet needs pyarrow: pip install ".[hub]"') from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{path}: not a parquet file ({error})") from None
    if "text" not in file.schema_arrow.names:
        raise InputError(f'{path}: no column "text", only {", ".join(file.schema_arrow.names)}')
    columns, number = [name for name in ("text", "lang", "source") if name in file.schema_arrow.names], 0
    try:
        for batch in file.iter_batches(1000, columns=columns):
            for row in batch.to_pylist():
                number += 1  # an empty cell is an empty text, and counted as one
                yield checked({"text": "", **{name: value for name, value in row.items() if value is not None}}, f"{path}: row {number}")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: damaged behind row {number} ({error})") from None


def documents_of(path):
    """Yield the documents of one file by its ending: {"text", "lang"?, "source"?}; th.jsonl and th.txt are labelled th where a line
    is not."""
    stem, name = printable(os.path.basename(path)).split(".")[0], os.path.basename(path).lower()
    if name.endswith(".txt"):
        yield {"text": read_text(path), "source": stem, **({"lang": stem} if stem in CODES else {})}
    elif name.endswith((".jsonl", ".jsonl.gz")):
        for number, value in read_jsonl(path):
            checked(value, f"{path}:{number}")
            yield {"lang": stem, **value} if stem in CODES else value
    elif name.endswith(".parquet"):
        yield from read_parquet(path)
    elif name.endswith((".html", ".htm")):
        with open(path, "rb") as file:
            yield {"text": html_to_text(decode_html(file.read())), "source": stem}
    else:
        for url, text in read_warc(path):
            yield {"text": text, "source": url}


def files_of(folder):
    """{name: path} of the files a step reads, in name order. Raises InputError when there is none."""
    return {name: os.path.join(folder, name) for name in files_in(folder, ENDINGS)}


def write_json(path, value):
    with open(path + ".part", "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
    os.replace(path + ".part", path)


def _end_with(parent):
    def watch():
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def processes(workers=None):
    """A pool whose workers end with the process that began them, even one that was killed: none goes on writing beside its rerun."""
    return ProcessPoolExecutor(workers, initializer=_end_with, initargs=(os.getpid(),))
