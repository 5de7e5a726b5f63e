"""Text to token ids and back: bytes, or a byte-level BPE that is trained once and cached."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dist_mtp.config import TokenizerConfig
from dist_mtp.data.cache import SHORT_HASH, cached_folder
from dist_mtp.errors import ConfigError, DataError

END_OF_TEXT = "<|endoftext|>"
"""Name of the end-of-text id in ``tokenizer.json``."""
TOKENIZER_FILE = "tokenizer.json"


class Tokenizer(Protocol):
    """What the rest of the package needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Every id lies in ``[0, vocab_size)``."""

    @property
    def eos_id(self) -> int:
        """The id that ends a document; :meth:`encode` never returns it, whatever the text."""

    @property
    def fingerprint(self) -> str:
        """Equal fingerprints encode every text to equal ids."""

    def encode(self, text: str) -> npt.NDArray[np.int64]:
        """Ids of ``text``, shape [N], without an end-of-text id."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of ``ids``, shape [N]; end-of-text ids vanish and incomplete UTF-8 becomes U+FFFD."""


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255, and 256 for the end of a text."""

    vocab_size = 257
    eos_id = 256
    fingerprint = "bytes-257"

    def encode(self, text: str) -> npt.NDArray[np.int64]:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        array = np.asarray(ids, dtype=np.int64)
        # A model whose vocabulary was padded can also produce ids above 256; they stand for no text either.
        return array[array < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class BpeTokenizer:
    """A byte-level BPE stored as ``tokenizer.json`` (format of the ``tokenizers`` package).

    Args:
        file: the ``tokenizer.json``.
        vocab_size: configured size; the model's embedding keeps it even if training text was too short to fill it.

    Raises:
        ConfigError: the package ``tokenizers`` is not installed.
        DataError: the file is missing, malformed, has no end-of-text id or more ids than ``vocab_size``.
    """

    def __init__(self, file: Path, vocab_size: int) -> None:
        _check_package()
        from tokenizers import Tokenizer as Backend

        try:
            raw = file.read_bytes()
            # The package raises bare Exception for a file it cannot parse.
            self._backend = Backend.from_str(raw.decode("utf-8"))
        except Exception as error:
            raise DataError(
                f"{file} is not a readable tokenizer ({error}): delete its folder to train it again"
            ) from error
        # Otherwise a text that contains the characters "<|endoftext|>" would end its document in the middle. The
        # setting is not part of the file.
        self._backend.encode_special_tokens = True
        eos_id = self._backend.token_to_id(END_OF_TEXT)
        if eos_id is None:
            raise DataError(f"{file} has no {END_OF_TEXT} id: use a tokenizer that dist-mtp trained")
        trained = self._backend.get_vocab_size()
        if trained > vocab_size:
            raise DataError(f"{file} has {trained} ids, more than tokenizer.vocab_size={vocab_size}: raise the latter")
        self.file = file
        self.vocab_size = vocab_size
        self.eos_id: int = eos_id
        self.fingerprint = f"bpe-{vocab_size}-{hashlib.sha256(raw).hexdigest()}"

    def encode(self, text: str) -> npt.NDArray[np.int64]:
        return np.asarray(self._backend.encode(text).ids, dtype=np.int64)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._backend.decode(np.asarray(ids, dtype=np.int64).tolist(), skip_special_tokens=True)


def tokenizer_vocab_size(config: TokenizerConfig) -> int:
    """Number of ids, known without reading or training anything."""
    return ByteTokenizer.vocab_size if config.name == "bytes" else config.vocab_size


def check_tokenizer(config: TokenizerConfig) -> None:
    """Find out whether the tokenizer can be made; for the launcher, before ranks are spawned.

    Raises:
        ConfigError: the package ``tokenizers`` is needed and not installed.
    """
    if config.name == "bpe":
        _check_package()


def make_tokenizer(config: TokenizerConfig, train_texts: Sequence[str], cache_dir: Path | str) -> Tokenizer:
    """The configured tokenizer; a BPE is trained on ``train_texts`` unless the cache has one from the same texts.

    Args:
        train_texts: texts of the training documents, and only those: merges learnt from validation text would make
            its loss per token look better than it is.
        cache_dir: ``data.cache_dir``; the BPE is kept in ``tokenizers/bpe-<vocab>-<hash>/tokenizer.json`` below it.

    Raises:
        ConfigError: the package ``tokenizers`` is not installed.
        DataError: the cached file is damaged.
    """
    if config.name == "bytes":
        return ByteTokenizer()
    _check_package()
    key = _training_hash(config.vocab_size, train_texts)[:SHORT_HASH]
    folder = Path(cache_dir) / "tokenizers" / f"bpe-{config.vocab_size}-{key}"

    def write(target: Path) -> dict[str, Any]:
        _train_bpe(config.vocab_size, train_texts).save(str(target / TOKENIZER_FILE))
        return {"vocab_size": config.vocab_size}

    cached_folder(folder, "manifest.json", write)
    return BpeTokenizer(folder / TOKENIZER_FILE, config.vocab_size)


def _train_bpe(vocab_size: int, train_texts: Sequence[str]) -> Any:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        # All 256 bytes, whether or not the text uses them, so that any text can be encoded without an unknown id.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(train_texts, trainer, length=len(train_texts))
    return backend


def _training_hash(vocab_size: int, train_texts: Sequence[str]) -> str:
    digest = hashlib.sha256(json.dumps(["byte-level bpe", 1, vocab_size, END_OF_TEXT]).encode())
    for text in train_texts:
        raw = text.encode("utf-8")
        # The length keeps ("ab", "c") and ("a", "bc") apart.
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()


def _check_package() -> None:
    if importlib.util.find_spec("tokenizers") is None:
        raise ConfigError(
            "tokenizer=bpe needs the package tokenizers, which is not installed: pip install dist-mtp[bpe], "
            "or use tokenizer=bytes"
        )
