"""A tokenised corpus on disk: written once, verified at each use, read through memory maps.

``<data.cache_dir>/<data.name>-<tokenizer>-<hash>/`` holds, for ``train`` and ``validation``:

- ``<split>.bin``: the ids of all documents, each followed by the end-of-text id, little-endian and without header;
- ``<split>_documents.npy``: int64 lengths of the documents in tokens, end-of-text id included;
- ``corpus.json``: counts, entropies, and size and SHA-256 of each file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dist_mtp.config import DataConfig, TokenizerConfig
from dist_mtp.data.cache import SHORT_HASH, cached_folder, verified
from dist_mtp.data.sources import Corpus, Document, load_documents
from dist_mtp.data.tokenizers import Tokenizer, make_tokenizer
from dist_mtp.errors import ConfigError

FORMAT = 1
"""Raise it when the files change meaning: it is hashed into the folder's name, so old folders are left alone."""
MANIFEST = "corpus.json"
Split = Literal["train", "validation"]


@dataclass(frozen=True)
class TokenStream:
    """All documents of a split, one after the other."""

    tokens: np.memmap
    """Token ids, uint16 or uint32 [N], read-only."""
    document_starts: npt.NDArray[np.int64]
    """Position in ``tokens`` of each document's first id, rising from 0."""


@dataclass(frozen=True)
class TokenizedCorpus:
    """What training needs: ids, without the text or the tokenizer they came from."""

    folder: Path
    info: dict[str, Any]
    """``corpus.json``. ``info["fingerprint"]`` identifies ids and split; checkpoints compare it."""

    def split(self, name: Split) -> TokenStream:
        tokens = np.memmap(self.folder / f"{name}.bin", dtype=np.dtype(self.info["dtype"]), mode="r")
        lengths = np.load(self.folder / f"{name}_documents.npy", allow_pickle=False)
        return TokenStream(tokens, np.cumsum(lengths) - lengths)


@dataclass(frozen=True)
class PreparedCorpus(TokenizedCorpus):
    tokenizer: Tokenizer


def open_corpus(folder: Path) -> TokenizedCorpus:
    """A corpus that :func:`prepare` made or verified, in this process or another; only sizes are checked again.

    Raises:
        DataError: a file is missing or has another size.
    """
    return TokenizedCorpus(folder, verified(folder, MANIFEST, check_hashes=False))


def prepare(data: DataConfig, tokenizer: TokenizerConfig, *, check_hashes: bool = True) -> PreparedCorpus:
    """Load, split, tokenise and store a corpus; later calls find the folder and only verify it.

    Safe to call from several processes at once, though only one of them does work that lasts: let the launcher call it
    before ranks start. The source text is read each time, because its hash decides which folder is the right one.

    Args:
        check_hashes: compare the SHA-256 of every file, not only its size.

    Raises:
        ConfigError: the source cannot be found, or has fewer than two documents.
        DataError: damaged source text, or a file of the cache that does not match ``corpus.json``.
    """
    corpus = load_documents(data)
    train, validation = split_documents(corpus.documents, data.validation_fraction)
    encoder = make_tokenizer(tokenizer, [document.text for document in train], data.cache_dir)
    fingerprint = _fingerprint(corpus, len(validation), encoder)
    folder = Path(data.cache_dir) / f"{data.name}-{tokenizer.name}-{fingerprint[:SHORT_HASH]}"

    def write(target: Path) -> dict[str, Any]:
        train_counts = _write_split(target, "train", train, encoder)
        validation_counts = _write_split(target, "validation", validation, encoder)
        return {
            "format": FORMAT,
            "fingerprint": fingerprint,
            "source": corpus.source,
            "tokenizer": encoder.fingerprint,
            "vocab_size": encoder.vocab_size,
            "dtype": token_dtype(encoder.vocab_size).str,
            "splits": {
                "train": _summary(train, train_counts),
                "validation": _summary(validation, validation_counts),
            },
            "unigram_entropy_nats": entropy(train_counts),
            "validation_unigram_cross_entropy_nats": smoothed_cross_entropy(train_counts, validation_counts),
        }

    info = cached_folder(folder, MANIFEST, write, check_hashes=check_hashes)
    return PreparedCorpus(folder, info, encoder)


def split_documents(
    documents: Sequence[Document], validation_fraction: float
) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """Training and validation documents, disjoint and each in the given order.

    Whole documents are kept out, because held-out pieces of a training document would share its names and phrases. The
    choice goes by the hash of a document's name: no seed, no dependence on the order of files.

    Raises:
        ConfigError: fewer than two documents.
    """
    if len(documents) < 2:
        raise ConfigError(
            f"the corpus has {len(documents)} document, but validation keeps whole documents out of training and needs "
            "at least 2: split the text into several files under data.path"
        )
    count = min(max(1, round(validation_fraction * len(documents))), len(documents) - 1)
    ranked = sorted(documents, key=lambda document: hashlib.sha256(document.name.encode("utf-8")).digest())
    held_out = {document.name for document in ranked[:count]}
    train = tuple(document for document in documents if document.name not in held_out)
    validation = tuple(document for document in documents if document.name in held_out)
    return train, validation


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest little-endian type that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def entropy(counts: npt.NDArray[np.int64]) -> float:
    """Entropy of the distribution ``counts / counts.sum()`` in nats; ``counts`` is [V]."""
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * np.log(probabilities)).sum())


def smoothed_cross_entropy(train_counts: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> float:
    """Nats per token of ``counts`` [V] under the add-one-smoothed unigram distribution of ``train_counts`` [V].

    The loss of the best model without context: a trained model that does not beat it has learnt frequencies only.
    """
    log_probabilities = np.log((train_counts + 1) / (train_counts.sum() + train_counts.size))
    return float(-(counts * log_probabilities).sum() / counts.sum())


def _fingerprint(corpus: Corpus, num_validation: int, tokenizer: Tokenizer) -> str:
    """SHA-256 over everything that determines the files."""
    digest = hashlib.sha256(json.dumps([FORMAT, corpus.source, num_validation, tokenizer.fingerprint]).encode())
    for document in corpus.documents:
        for part in (document.name.encode("utf-8"), document.text.encode("utf-8")):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _write_split(
    folder: Path, split: Split, documents: Sequence[Document], tokenizer: Tokenizer
) -> npt.NDArray[np.int64]:
    """Write a split's ids and lengths; return how often each id occurs, [V]."""
    dtype = token_dtype(tokenizer.vocab_size)
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    lengths = []
    with (folder / f"{split}.bin").open("wb") as file:
        for document in documents:
            ids = np.append(tokenizer.encode(document.text), tokenizer.eos_id)
            file.write(ids.astype(dtype).tobytes())
            counts += np.bincount(ids, minlength=tokenizer.vocab_size)
            lengths.append(len(ids))
    np.save(folder / f"{split}_documents.npy", np.asarray(lengths, dtype=np.int64))
    return counts


def _summary(documents: Sequence[Document], counts: npt.NDArray[np.int64]) -> dict[str, int]:
    return {
        "documents": len(documents),
        "tokens": int(counts.sum()),
        "text_bytes": sum(len(document.text.encode("utf-8")) for document in documents),
    }
