"""encoder.py: gigatoken's ids are tiktoken's for any text, and its memory is bounded."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import ODD_TEXTS

from aymen_gpt.data import encoder, tokenizer
from aymen_gpt.errors import CannotWrite

gigatoken = pytest.importorskip("gigatoken")

BLANKS = [*" \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u2003\u2028\u3000", "\r\n"]
ENDINGS = [
    "'s",
    "'t",
    "'re",
    "'ve",
    "'m",
    "'ll",
    "'d",
    "'S",
    "'LL",
    "'Ve",
    "\u2019s",
    "''s",
    " 's",
    "'",
    "'lls",
    "'x",
]
CLASSES = [*"aÉßǅʰא中1²Ⅷ½٣१_-$€∑😀\u0301"]
MARKS = [*"\u0301\u20dd\u0e31\u200d\u200b\ufe0f\u202e\ufeff\ufffd\x00\x7f"]
ADVERSARIAL = [
    *ODD_TEXTS,
    *map(chr, range(256)),
    *(f"x{blank * n}y{blank * n}" for blank in BLANKS for n in (1, 2, 3, 17)),
    *(f"{a}{b} {a}{b}{a} w" for a in BLANKS for b in BLANKS),
    *(f"{before}{ending}{after}" for before in CLASSES for ending in ENDINGS for after in ("", "s", " ", "1")),
    *(f"{a}{b}{a}{a} {b} {a}" for a in CLASSES for b in CLASSES),
    *(f"{a}{mark}{a} {mark}{mark} {mark}{a}" for a in CLASSES for mark in MARKS),
    *(letter * n for letter in CLASSES + MARKS + BLANKS for n in (63, 64, 65, 4097)),
    *("supercalifragilistic" * n for n in (1, 10, 1000)),
    *(f"word{blank * 10**6}word" for blank in (" ", "\n", "\t ")),
    "👩‍👩‍👧‍👦🏳️‍🌈👍🏽 e\u0301e\u0301 ﬁ \U0001d518 \U0010ffff \ue000",
    "one\r\ntwo\r\n\r\n three\n\r four\r",
    "<|endoftext|>",
    " <|endoftext|>\n<|endoftext|><|endoftext|",
    "a\ud800b \udfff",
]


@pytest.fixture(scope="module")
def fast():
    return encoder.Gigatoken(encoder.resident_bytes)


def test_odd_texts_get_tiktokens_ids(fast):
    for text in ADVERSARIAL:
        assert fast.encode(tokenizer.utf8(text)).tolist() == tokenizer.encode(text).tolist(), text


PIECES = st.sampled_from(BLANKS + ENDINGS + CLASSES + MARKS + ["the", " of"])


@given(st.one_of(st.text(st.characters(exclude_categories=())), st.lists(PIECES, max_size=40).map("".join)))
@settings(max_examples=200)
def test_any_text_gets_tiktokens_ids(text):
    (ids,) = encoder.encode_documents([tokenizer.utf8(text)], "gigatoken")
    assert ids.tolist() == tokenizer.encode(text).tolist()


def test_every_pair_of_bytes_gets_tiktokens_ids(fast):
    text = "".join(f"{chr(a)}{chr(b)}\n" for a in range(256) for b in range(256))
    assert np.array_equal(fast.encode(tokenizer.utf8(text)), tokenizer.encode(text))


UNICODE_17 = [*"\u088f\u0c5c\ua7ce\U00010940\U00016eb8\U000187ff\U0001e6ff\U000323b0\U00033479"]


@pytest.mark.parametrize("letter", UNICODE_17)
@pytest.mark.parametrize("text", ["{}'s", "a{}'ll", "1{}'t", " {}{}'re", "word {}'ve word", "{}'d" + "x" * 10**6])
def test_letters_that_tiktoken_does_not_know_yet_get_its_ids(letter, text):
    (ids,) = encoder.encode_documents([text.format(letter, letter).encode()], "gigatoken")
    assert ids.tolist() == tokenizer.encode(text.format(letter, letter)).tolist()


@pytest.mark.slow
def test_every_character_there_is_gets_tiktokens_ids(fast):
    """Each between contractions, letters, numbers and blanks; those that both know alike in few large texts."""
    raw, around = encoder.build(), "{0}'s a{0}'ll 1{0} {0}'t"
    for start in range(0, 0x110000, 2**16):
        letters = [chr(i) for i in range(start, start + 2**16) if not 0xD800 <= i < 0xE000]
        odd = [letter for letter in letters if encoder._unlike(letter.encode())]
        text = "\n".join(map(around.format, sorted(set(letters) - set(odd))))
        assert np.array_equal(raw.encode(text.encode()), tokenizer.gpt2().encode_to_numpy(text))
        for text in map(around.format, odd):
            assert fast.encode(text.encode()).tolist() == tokenizer.encode(text).tolist()


def test_a_long_document_is_encoded_in_pieces(fast, monkeypatch):
    text = "A line of text, then another.\n" * 50
    monkeypatch.setattr(tokenizer, "PIECE", 100)
    assert len(list(tokenizer.pieces(text))) > 10
    assert fast.encode(tokenizer.utf8(text)).tolist() == tokenizer.gpt2().encode_ordinary(text)


@pytest.mark.parametrize(
    ("memory", "rebuilt"),
    [(lambda: 0, False), (lambda: None, True), (iter(range(0, 10**12, encoder.REMEMBERED + 1)).__next__, True)],
)
def test_an_encoder_that_grew_too_much_is_built_anew(monkeypatch, memory, rebuilt):
    monkeypatch.setattr(encoder, "CHECKED", 100)
    one = encoder.Gigatoken(memory)
    first = one._encoder
    one.encode(b"x" * 100)
    assert one._encoder is first
    assert one.encode(b"some words").tolist() == tokenizer.encode("some words").tolist()
    assert (one._encoder is not first) == rebuilt


GROWTH = """
import sys
import numpy as np
from aymen_gpt.data import encoder
encoder.CHECKED, encoder.REMEMBERED = 2**21, 2**25
fast, letters = encoder.Gigatoken(encoder.resident_bytes), np.random.default_rng(0)
before = encoder.resident_bytes()
for _ in range(24):  # a MB of words that nobody has seen, each time
    words = letters.integers(97, 123, (2**17, 8), dtype=np.uint8)
    words[:, 7] = 32
    fast.encode(words.tobytes())
print(encoder.resident_bytes() - before)
"""


@pytest.mark.skipif(encoder.resident_bytes() is None, reason="the system does not tell its memory")
def test_memory_stays_bounded_when_every_word_is_new():
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2**27, "24 MB of new words take 240 MB when they are never forgotten"


def test_without_gigatoken_the_reason_is_how_to_get_it(monkeypatch):
    assert encoder.missing() is None
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gigatoken", None)
        assert encoder.missing() == f"`pip install {encoder.WHEEL}` makes this several times faster"

    def full(*args):
        raise CannotWrite("cannot write it: disk full")

    monkeypatch.setattr(encoder, "_rank_file", full)
    assert encoder.missing() == "gigatoken would be faster, but cannot write it: disk full"


def test_nothing_is_downloaded_and_a_spoiled_rank_file_is_replaced(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    vocabulary = tokenizer._vocabulary_file("vocab.bpe").read_bytes()
    (tmp_path / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee").write_bytes(vocabulary)
    monkeypatch.setenv("AYMEN_GPT_CACHE", str(tmp_path / "cache"))
    path = encoder._rank_file()
    path.write_bytes(b"IQ== 0\n")
    assert encoder.build().encode("Hello world").tolist() == [15496, 995]
    assert [file.name for file in path.parent.iterdir()] == ["r50k_base.tiktoken"]


def test_the_pinned_version_is_the_one_that_is_suggested():
    assert encoder.WHEEL in (ROOT / "requirements.txt").read_text().splitlines()
    assert f'"{encoder.WHEEL}"' in (ROOT / "pyproject.toml").read_text()
    assert encoder.version("gigatoken") == encoder.WHEEL.partition("==")[2]
