import sys
from pathlib import Path

import numpy as np
import pytest

from dist_mtp.config import TokenizerConfig
from dist_mtp.data.tokenizers import (
    END_OF_TEXT,
    BpeTokenizer,
    ByteTokenizer,
    Tokenizer,
    check_tokenizer,
    make_tokenizer,
    tokenizer_vocab_size,
)
from dist_mtp.errors import ConfigError, DataError

BPE = TokenizerConfig(name="bpe", vocab_size=400)
TRAIN_TEXTS = ["the quick brown fox jumps over the lazy dog " * 20, "there is nothing either good or bad " * 20]
TEXTS = [
    "",
    "plain",
    "  leading, trailing and\r\n\tdouble  spaces  ",
    "naïve — “quotes” … ﬁ",
    "漢字 кириллица עברית",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001d54f",
    "".join(map(chr, range(0x250))),
    "\u2028\ufeff\ufffd\U0010ffff",
    f"a text about {END_OF_TEXT} itself",
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest, cache: Path) -> Tokenizer:
    return make_tokenizer(TokenizerConfig(name=request.param, vocab_size=400), TRAIN_TEXTS, cache)


class TestRoundTrip:
    """Any text comes back unchanged, its ids lie in the vocabulary, and none of them ends the document."""

    @pytest.mark.parametrize("text", TEXTS)
    def test_text(self, tokenizer: Tokenizer, text: str) -> None:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int64
        assert ids.ndim == 1
        assert tokenizer.decode(ids) == text, f"{tokenizer.decode(ids)!r} != {text!r}"
        assert tokenizer.eos_id not in ids, f"text contains the end-of-text id {tokenizer.eos_id}: {ids}"
        outside = ids[(ids < 0) | (ids >= tokenizer.vocab_size)]
        assert not outside.size, f"{outside} lie outside [0, {tokenizer.vocab_size})"

    def test_end_of_text_vanishes(self, tokenizer: Tokenizer) -> None:
        ids = [*tokenizer.encode("one").tolist(), tokenizer.eos_id, *tokenizer.encode("two").tolist()]
        assert tokenizer.decode(ids) == "onetwo", f"{tokenizer.decode(ids)!r} != 'onetwo'"

    def test_incomplete_utf8_becomes_a_replacement(self, tokenizer: Tokenizer) -> None:
        ids = tokenizer.encode("é")[:1]
        assert tokenizer.decode(ids) == "\ufffd", f"{tokenizer.decode(ids)!r} != '\ufffd'"

    def test_ids_beyond_the_vocabulary_vanish(self) -> None:
        assert ByteTokenizer().decode([65, 300, 66]) == "AB"


class TestVocabularySize:
    """The size is known before training and holds afterwards, also when the text is too short to fill it."""

    def test_sizes(self, tokenizer: Tokenizer) -> None:
        name = "bytes" if isinstance(tokenizer, ByteTokenizer) else "bpe"
        expected = tokenizer_vocab_size(TokenizerConfig(name=name, vocab_size=400))
        assert tokenizer.vocab_size == expected, f"{tokenizer.vocab_size} != {expected}"
        assert tokenizer.eos_id < expected, f"eos {tokenizer.eos_id} is outside {expected} ids"

    def test_short_text_keeps_the_configured_size(self, tmp_path: Path) -> None:
        config = TokenizerConfig(name="bpe", vocab_size=5000)
        tokenizer = make_tokenizer(config, ["few words"], tmp_path)
        assert tokenizer.vocab_size == 5000, f"{tokenizer.vocab_size} != 5000"
        assert tokenizer.decode(tokenizer.encode("other words")) == "other words"


class TestBpeCache:
    """A BPE is trained once per (texts, size), and a changed file is never used."""

    def test_merges_were_learnt(self, cache: Path) -> None:
        ids = make_tokenizer(BPE, TRAIN_TEXTS, cache).encode(TRAIN_TEXTS[0])
        assert len(ids) < len(TRAIN_TEXTS[0]) / 2, f"{len(ids)} ids for {len(TRAIN_TEXTS[0])} bytes"

    def test_second_call_does_not_train(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = make_tokenizer(BPE, TRAIN_TEXTS, cache)
        monkeypatch.setattr("dist_mtp.data.tokenizers._train_bpe", lambda *_: pytest.fail("trained again"))
        second = make_tokenizer(BPE, TRAIN_TEXTS, cache)
        assert first.fingerprint == second.fingerprint, f"{first.fingerprint} != {second.fingerprint}"

    def test_path_depends_on_texts_and_size(self, tmp_path: Path) -> None:
        for size, texts in ((300, ["ab", "c"]), (300, ["a", "bc"]), (301, ["ab", "c"])):
            make_tokenizer(TokenizerConfig(name="bpe", vocab_size=size), texts, tmp_path)
        files = sorted(tmp_path.glob("tokenizers/bpe-*/tokenizer.json"))
        assert len(files) == 3, f"{len(files)} cached tokenizers, expected 3: {files}"

    def test_training_is_deterministic(self, cache: Path, tmp_path: Path) -> None:
        first, second = (make_tokenizer(BPE, TRAIN_TEXTS, folder).fingerprint for folder in (cache, tmp_path))
        assert first == second, f"{first} != {second}"

    def test_damage_is_found(self, tmp_path: Path) -> None:
        make_tokenizer(BPE, TRAIN_TEXTS, tmp_path)
        (file,) = tmp_path.glob("tokenizers/bpe-*/tokenizer.json")
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 1
        file.write_bytes(raw)
        with pytest.raises(DataError, match=r"tokenizer\.json is damaged: SHA-256 .* delete the folder"):
            make_tokenizer(BPE, TRAIN_TEXTS, tmp_path)


class TestErrors:
    """Each refusal names the cause and the fix."""

    def test_package_is_not_installed(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setitem(sys.modules, "tokenizers", None)
        for call in (lambda: check_tokenizer(BPE), lambda: make_tokenizer(BPE, TRAIN_TEXTS, tmp_path)):
            with pytest.raises(ConfigError, match=r"tokenizer=bpe.*pip install dist-mtp\[bpe\].*tokenizer=bytes"):
                call()
        check_tokenizer(TokenizerConfig(name="bytes"))

    def test_file_is_not_a_tokenizer(self, tmp_path: Path) -> None:
        file = tmp_path / "tokenizer.json"
        file.write_text("{}")
        with pytest.raises(DataError, match=r"tokenizer\.json is not a readable tokenizer"):
            BpeTokenizer(file, 400)

    def test_file_without_end_of_text(self, tmp_path: Path, cache: Path) -> None:
        trained = make_tokenizer(BPE, TRAIN_TEXTS, cache)
        assert isinstance(trained, BpeTokenizer)
        file = tmp_path / "tokenizer.json"
        file.write_text(trained.file.read_text(encoding="utf-8").replace(END_OF_TEXT, "<|other|>"), encoding="utf-8")
        with pytest.raises(DataError, match=r"has no <\|endoftext\|> id"):
            BpeTokenizer(file, 400)

    def test_file_is_larger_than_the_vocabulary(self, cache: Path) -> None:
        trained = make_tokenizer(BPE, TRAIN_TEXTS, cache)
        assert isinstance(trained, BpeTokenizer)
        with pytest.raises(DataError, match=r"ids, more than tokenizer\.vocab_size=300"):
            BpeTokenizer(trained.file, 300)
