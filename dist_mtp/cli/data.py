"""``dist-mtp data``: tokenise the configured corpus, or verify it, and print what it holds."""

from __future__ import annotations

import math

from dist_mtp.cli.compose import compose
from dist_mtp.config import Config
from dist_mtp.data.corpus import PreparedCorpus, prepare
from dist_mtp.data.packing import PackedRows


def main(arguments: list[str]) -> int:
    """``dist-mtp data [overrides]``."""
    return run(compose(arguments))


def run(config: Config) -> int:
    """Prepare the corpus and print a summary; returns exit code 0.

    Raises:
        ConfigError: the source or the tokenizer's package is missing.
        DataError: the text or the cached corpus is damaged.
    """
    print(summary(config, prepare(config.data, config.tokenizer)))
    return 0


def summary(config: Config, corpus: PreparedCorpus) -> str:
    """Aligned ``label  value`` lines about a prepared corpus."""
    info = corpus.info
    source = info["source"]
    if source != config.data.source:
        source += f" (data.fallback: {config.data.source} is not installed)"
    lines = {
        "corpus": config.data.name,
        "source": source,
        "tokenizer": f"{config.tokenizer.name}, {corpus.tokenizer.vocab_size} ids",
    }
    for split in ("train", "validation"):
        counts = info["splits"][split]
        stream = corpus.split(split)
        rows = len(PackedRows(stream.tokens, stream.document_starts, config.train.seq_len, config.mtp.depth))
        lines[split] = (
            f"{counts['documents']:,} documents, {counts['text_bytes']:,} bytes, {counts['tokens']:,} tokens, "
            f"{rows:,} rows at train.seq_len={config.train.seq_len}"
        )
    lines["unigram entropy"] = _nats_and_bits(info["unigram_entropy_nats"])
    lines["validation under it"] = _nats_and_bits(info["validation_unigram_cross_entropy_nats"])
    lines["folder"] = str(corpus.folder)
    width = max(map(len, lines))
    return "\n".join(f"{label:<{width}}  {value}" for label, value in lines.items())


def _nats_and_bits(nats: float) -> str:
    return f"{nats:.4f} nats/token = {nats / math.log(2):.4f} bits/token"
