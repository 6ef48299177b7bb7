"""A small corpus of real text, a tokenizer and a prepared dataset, shared by the tests of `corpus` and `data`."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from moba_megatron.corpus.prepare import prepare
from moba_megatron.corpus.recipe import Recipe, recipe_from_dict
from moba_megatron.corpus.tokenizer import Tokenizer, train_bpe


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Sixty short documents and one long one, with characters outside ASCII and every kind of line end among them."""
    source = Path(sysconfig.get_path("stdlib"), "argparse.py").read_text(encoding="utf-8")
    pieces = [source[start : start + 200 + 37 * n] for n, start in enumerate(range(0, 60 * 1200, 1200))]
    return [*pieces, "naïve — 東京 \U0001f600\r\n\ttabs\x00 and 12345 é\r", source]


@pytest.fixture(scope="session")
def tokenizer(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_bpe(texts, 400, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def text_folder(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number, text in enumerate(texts):
        path = folder / f"part{number % 3}" / f"{number:03d}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode())
    return folder


@pytest.fixture(scope="session")
def recipe(text_folder: Path, tokenizer: Tokenizer) -> Recipe:
    return recipe_from_dict({
        "sources": [{"kind": "files", "path": str(text_folder)}],
        "tokenizer": {"kind": "pretrained", "path": str(tokenizer.folder)},
        "split": {"validation": 0.2},
    })  # fmt: skip


@pytest.fixture(scope="session")
def dataset(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a prepared dataset; tests must not change it."""
    folder = tmp_path_factory.mktemp("prepared") / "dataset"
    prepare(recipe, folder, workers=1)
    return folder
