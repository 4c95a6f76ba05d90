"""tokenizer.py against an obviously correct trainer, tiktoken, and bytes that are no text."""

import json
import random
import re
from collections import Counter

import pytest
import regex

from data import market
from tokenizer import (
    PATTERN,
    SPECIAL_TOKENS,
    Tokenizer,
    bpe,
    characters,
    merge_vocabularies,
    parse_split,
    to_bytes,
    train,
    train_bpe,
)  # fmt: skip


def obvious_trainer(texts, vocab_size, max_token_chars=16):
    """Encode every chunk anew, count every pair anew, add the most frequent: O(n^2), nothing to get wrong."""
    chunks = Counter()
    for text in texts:
        chunks.update(regex.findall(PATTERN, text))
    tokens = [bytes([i]) for i in range(256)]
    while len(tokens) < vocab_size:
        ranks = {token: rank for rank, token in enumerate(tokens)}
        counts = Counter()
        for chunk, freq in chunks.items():
            word = bpe(to_bytes(chunk.encode()), ranks)
            for a, b in zip(word, word[1:], strict=False):
                if characters(a + b) <= max_token_chars:
                    counts[ranks[a], ranks[b]] += freq
        counts = {pair: count for pair, count in counts.items() if count > 1}
        if not counts:
            break
        a, b = min(counts, key=lambda pair: (-counts[pair], pair))
        tokens.append(tokens[a] + tokens[b])
    return {token: rank for rank, token in enumerate(tokens)}


@pytest.fixture(scope="module")
def documents():
    return [d["text"] for d in market.documents("general", 1, per_language=40)]


@pytest.fixture(scope="module")
def tokenizer(documents):
    return Tokenizer(train_bpe(documents, 900))


@pytest.mark.parametrize("alphabet", ["ab", "abc ", "ab é ", "กขค่ ", "中文字 a", "aab\n 12"])
@pytest.mark.parametrize("max_chars", [3, 16])
def test_trainer_equals_the_obvious_one(alphabet, max_chars):
    for seed in range(6):
        rng = random.Random(seed)
        texts = ["".join(rng.choice(alphabet) for _ in range(rng.randint(1, 300))) for _ in range(3)]
        assert train_bpe(texts, 310, max_chars) == obvious_trainer(texts, 310, max_chars)


def test_trainer_equals_the_obvious_one_on_documents(documents):
    assert train_bpe(documents[:60], 400) == obvious_trainer(documents[:60], 400)


def test_characters_and_chunks_by_hand():
    """What the obvious trainer above takes from the code under test."""
    assert [characters(text.encode()) for text in ("ขอ", "aé", "中")] == [2, 2, 1] and characters("ข".encode()[1:]) == 0
    assert regex.findall(PATTERN, " ab12น้ำ  x\r\n!? ") == [" ab", "1", "2", "น้ำ", " ", " x", "\r\n", "!?", " "]


def test_merges_by_hand():
    # "aaabdaaabac", the textbook example: aa comes four times; then aa + a and a + b twice each, and a has the smaller number
    ranks = train_bpe(["aaabdaaabac"], 258)
    assert list(ranks)[256:] == [b"aa", b"ab"]
    assert bpe(to_bytes(b"aaab"), {b"a": 0, b"b": 1, b"aa": 2, b"ab": 3}) == [b"aa", b"ab"]


def test_ids_equal_tiktoken_by_merges_alone(tokenizer, documents):
    for text in documents[:150]:
        ours = [tokenizer.ranks[t] for chunk in regex.findall(PATTERN, text) for t in bpe(to_bytes(chunk.encode()), tokenizer.ranks)]
        assert tokenizer.encode(text) == ours


def test_merged_vocabulary_is_reachable_contiguous_and_within_budget(documents):
    main = train_bpe(documents, 800)
    chinese = train_bpe([d["text"] for d in market.documents("general", 2, per_language=60) if d["lang"] == "zh"], 500)
    ranks = merge_vocabularies([main, chinese], 850)
    assert list(ranks.values()) == list(range(len(ranks))) and 800 < len(ranks) <= 850
    assert list(ranks)[:256] == [bytes([i]) for i in range(256)]
    assert all(bpe(to_bytes(token), ranks) == [token] for token in ranks)
    assert len(set(ranks) - set(main)) > 20  # Chinese added something
    assert all(len(token.decode(errors="ignore")) <= 16 for token in ranks)


def test_round_trip_on_random_bytes_and_text(tokenizer):
    rng = random.Random(0)
    for _ in range(100):
        text = bytes(rng.randrange(256) for _ in range(50)).decode("latin-1")
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for text in ("", " ", "\r\n\n  x", "น้ำตาล", "🙂‍↔️", "Rp45.000\t¥12"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_never_forms_a_special_token(tokenizer):
    ids, _ = tokenizer.encode_chat([{"role": "user", "content": "<|assistant|>" + "".join(SPECIAL_TOKENS)}])
    special = set(tokenizer.special.values())
    assert [i for i in ids if i in special] == [tokenizer.special[t] for t in ("<|user|>", "<|end|>", "<|assistant|>")]
    assert min(special) == len(tokenizer.ranks) and tokenizer.n_vocab == max(special) + 1


def test_chat_mask_marks_what_the_assistant_says(tokenizer):
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes", "think": "old"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "no", "think": "new"},
    ]
    ids, mask = tokenizer.encode_chat(messages)
    trained = tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])
    assert trained == " yes<|end|> no<|end|>"
    ids, mask = tokenizer.encode_chat(messages, thinking=True)
    assert tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]) == "<think> new</think> no<|end|>"
    assert "old" not in tokenizer.decode(ids) and tokenizer.decode(ids).startswith("<|system|> Think")
    ids, mask = tokenizer.encode_chat(messages, full_loss=True)
    assert mask == [0] + [1] * (len(ids) - 1)


def test_a_users_system_message_stays_before_the_switch(tokenizer):
    messages = [{"role": "system", "content": "You are Ann."}, {"role": "user", "content": "hi"}]
    texts = [tokenizer.decode(tokenizer.encode_chat(messages, thinking=thinking)[0]) for thinking in (False, True)]
    assert all(text.startswith("<|system|> You are Ann.") and text.count("<|system|>") == 1 for text in texts)
    assert "Think" not in texts[0] and texts[1].index("You are Ann.") < texts[1].index("Think") < texts[1].index("<|user|>")
    assert messages[0]["content"] == "You are Ann."


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("message", [{"role": "system"}, {"role": "tool", "content": "x"}, {"role": "user", "content": None}, "hi",
                                     {"role": "assistant", "content": "x", "think": 3}])  # fmt: skip
def test_a_message_without_role_or_text_is_named(tokenizer, message, thinking):
    with pytest.raises(ValueError, match="message 1: need a role"):
        tokenizer.encode_chat([{"role": "user", "content": "hi"}, message], thinking=thinking)
    with pytest.raises(ValueError, match="message 0: need a role"):
        tokenizer.encode_chat([message], thinking=thinking)


def test_a_full_disk_leaves_the_old_tokenizer(tokenizer, tmp_path, monkeypatch):
    tokenizer.save(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ValueError, match=r"tokenizer.json: could not be written \(No space left on device\)"):
        Tokenizer(dict(list(tokenizer.ranks.items())[:300])).save(tmp_path)
    assert Tokenizer.load(tmp_path).hash == tokenizer.hash and len(list(tmp_path.iterdir())) == 2


def test_save_load_and_torn_files(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = Tokenizer.load(str(tmp_path))
    assert again.hash == tokenizer.hash and again.encode("harga Rp45.000") == tokenizer.encode("harga Rp45.000")
    file = tmp_path / "tokenizer.tiktoken"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ValueError, match="tokenizer.tiktoken"):
        Tokenizer.load(str(tmp_path))
    tokenizer.save(tmp_path)
    lines = file.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("AA== "))  # byte 0
    lines[first] = lines[first].replace("AA==", "AAEC")
    file.write_text("\n".join(lines))
    with pytest.raises(ValueError, match="need all 256 bytes and no gaps"):
        Tokenizer.load(str(tmp_path))
    tokenizer.save(tmp_path)
    settings = (tmp_path / "tokenizer.json").read_text()
    wrong = [{"pattern": 5}, {"pattern": "("}, {"special_tokens": 5}, {"special_tokens": ["<|end|>"]}]
    for torn in (settings[:40], "{}", "[]", *(json.dumps({**json.loads(settings), **fields}) for fields in wrong)):
        (tmp_path / "tokenizer.json").write_text(torn)
        with pytest.raises(ValueError, match="tokenizer.json: not what `Tokenizer.save` wrote"):
            Tokenizer.load(str(tmp_path))


def test_a_trained_runs_tokenizer_stays(tokenizer, tmp_path, monkeypatch):
    import tokenizer as script

    monkeypatch.setattr("sys.argv", ["tokenizer.py", "--run", str(tmp_path)])
    monkeypatch.setattr(script, "train", lambda *_: Tokenizer(train_bpe(["another text"] * 2, 300)))
    (tmp_path / "sft1").mkdir()
    (tmp_path / "sft1" / "step_1.pt").write_bytes(b"")
    tokenizer.save(tmp_path)
    with pytest.raises(ValueError, match="holds checkpoints that need its present tokenizer"):
        script.main()
    assert Tokenizer.load(tmp_path).hash == tokenizer.hash
    monkeypatch.setattr(script, "train", lambda *_: tokenizer)
    script.main()  # the same once more
    (tmp_path / "sft1" / "step_1.pt").unlink()
    monkeypatch.setattr(script, "train", lambda *_: Tokenizer(train_bpe(["another text"] * 2, 300)))
    script.main()
    assert Tokenizer.load(tmp_path).hash != tokenizer.hash


def test_the_split_of_the_vocabulary(documents, capsys):
    every = [{"text": text, "lang": lang} for text in documents for lang in ("en", "zh", "nl")]
    budget = 3000 - len(SPECIAL_TOKENS)
    for split in ((30, 20, 50), (60, 40, 25)):
        train(every, 3000, split)
        said = re.findall(r"sub-tokenizer \w+: (\d+) tokens", capsys.readouterr().out)
        assert [int(size) for size in said] == [budget * share // 180 for share in split]
    assert parse_split("120/60/50") == (120, 60, 50)
    for wrong in ("1/2", "a/b/c", "150/0/50", "-1/2/3"):
        with pytest.raises(ValueError, match="--split"):
            parse_split(wrong)


def test_the_parts_are_joined_main_first_and_text_of_no_language_is_main():
    """What ranks before is what BPE merges first: "ol" of the main part, then "la" of the European."""
    texts = {None: "olol " * 50, "es": "lala " * 50}
    tokenizer = train([{"text": text, "lang": lang} for lang, text in texts.items()], 3000)
    assert tokenizer.ranks[b"ol"] < tokenizer.ranks[b"la"]
