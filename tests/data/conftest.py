from pathlib import Path

import pytest

from dist_mtp.config import DataConfig

TEXTS = {
    f"part_{i}.txt": f"Document {i}: " + "to be, or not to be — that is the question. " * (i + 1) for i in range(8)
}


@pytest.fixture
def text_data(tmp_path: Path) -> DataConfig:
    """Eight small text files with different lengths, and an empty cache."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / name).write_text(text, encoding="utf-8")
    return DataConfig(
        name="texts", source="text", path=str(folder), validation_fraction=0.25, cache_dir=str(tmp_path / "cache")
    )
