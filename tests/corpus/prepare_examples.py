"""Recipes, and what to compare of the datasets that they make, for the tests of `prepare`."""

from __future__ import annotations

from pathlib import Path

from moba_megatron.corpus.documents import Document
from moba_megatron.corpus.encode import choose_split
from moba_megatron.corpus.prepare_plan import plan_preparation
from moba_megatron.corpus.recipe import Recipe, recipe_from_dict
from moba_megatron.corpus.sources import read_part

DATA_FILES = ("train.bin", "train.idx", "validation.bin", "validation.idx", "tokenizer/tokenizer.json")


def changed(recipe: Recipe, **changes: object) -> Recipe:
    return recipe_from_dict(recipe.model_dump() | changes)


def stdlib_recipe(tokenizer: dict[str, object]) -> Recipe:
    """Some modules of the standard library, 2.7 MB: enough for three parts."""
    return recipe_from_dict({"sources": [{"kind": "python_stdlib", "pattern": "[a-r]*.py"}], "tokenizer": tokenizer})


def data_bytes(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in DATA_FILES}


def documents_of(recipe: Recipe, split: str) -> list[str]:
    plan = plan_preparation(recipe)
    items = [(recipe.sources[part.source], item) for part in plan.parts for item in read_part(recipe.sources[0], part)]
    return [i.text for source, i in items if isinstance(i, Document) and choose_split(recipe, source, i) == split]
