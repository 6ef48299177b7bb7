from __future__ import annotations

import re
from pathlib import Path

import pytest

from moba_megatron.config import ConfigError
from moba_megatron.corpus.mix_views import load_mix
from moba_megatron.corpus.recipe import load_recipe, recipe_from_dict

REPOSITORY = Path(__file__).parents[2]
GOOD = {"sources": [{"kind": "jsonl", "path": "a.jsonl"}], "tokenizer": {"kind": "bpe", "vocab_size": 300}}


def test_the_shipped_recipe_loads_and_takes_overrides():
    recipe = load_recipe(
        REPOSITORY / "data" / "python_stdlib.yaml",
        ["tokenizer.vocab_size=8192", "sources.0.pattern=*.py", "split.validation=0.1"],
    )
    assert recipe.tokenizer.vocab_size == 8192
    assert recipe.sources[0].pattern == "*.py"
    assert "test" in recipe.sources[0].exclude
    assert recipe.split.validation == 0.1


def test_overrides_of_strings_are_text_and_another_kind_takes_the_place_of_the_one_there(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "sources: [{kind: jsonl, path: a.jsonl, text_column: body}]\ntokenizer: {kind: bpe, vocab_size: 300}\n"
    )
    recipe = load_recipe(path, ["sources[0].path=web #2/*.jsonl", "tokenizer={kind: pretrained, path: x}"])
    assert (recipe.sources[0].path, recipe.tokenizer.path) == ("web #2/*.jsonl", "x")
    recipe = load_recipe(path, ["sources.0.kind=parquet", "tokenizer.path=007", "tokenizer.kind=pretrained"])
    assert (recipe.sources[0].kind, recipe.sources[0].text_column) == ("parquet", "body")
    assert recipe.tokenizer.path == "007"
    with pytest.raises(ConfigError, match="tokenizer.pretrained.pth: unknown key"):
        load_recipe(path, ["tokenizer={kind: pretrained, path: x}", "tokenizer.pth=y"])
    with pytest.raises(ConfigError, match=r"sources.0.path = \?{3}"):
        load_recipe(path, ["sources.0.path=???"])


def test_every_configuration_finds_the_recipe_of_its_data():
    made = {path.stem for path in (REPOSITORY / "data").glob("*.yaml") if path.stem != "long_mix" and load_recipe(path)}
    made |= {"needle", "needle_256"}  # samples that a launch script writes
    configurations = "".join(path.read_text() for path in (REPOSITORY / "configs").rglob("*.yaml"))
    named = set(re.findall(r"data/prepared/(\w+)/(?:train|validation|tokenizer)", configurations))
    assert {"paper", "long_documents", "instructions"} <= named <= made


def test_the_recipes_of_the_long_mix_load_and_fit_each_other():
    folder = REPOSITORY / "data"
    tests, mix = load_recipe(folder / "python_tests.yaml"), load_mix(folder / "long_mix.yaml")
    assert tests.filters.exact_duplicates == "drop"
    assert tests.tokenizer.path == "data/prepared/python_stdlib/tokenizer"
    assert [source.label for source in mix.sources] == ["python_stdlib", "python_tests"]
    assert [start for start, _, _ in mix.ranges] == [1, 16384]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokeniser": {}}, "tokeniser: unknown key"),
        ({"sources": [{"kind": "jsonl", "path": "a", "text_colum": "x"}]}, "text_colum: unknown key"),
        ({"sources": [{"kind": "csv", "path": "a"}]}, "csv"),
        ({"sources": [{"path": "a"}]}, "kind"),
        ({"sources": []}, "sources"),
        (
            {"tokenizer": {"kind": "bpe", "vocab_size": 100}},
            "vocab_size = 100: input should be greater than or equal to 257",
        ),
        ({"tokenizer": {"kind": "bpe", "vocab_size": "4096"}}, "vocab_size = '4096'"),
        ({"split": {"validation": 1.0}}, "split.validation = 1.0"),
        ({"filters": {"min_tokens": 9, "max_tokens": 5}}, "filters: max_tokens = 5 is below min_tokens = 9"),
    ],
)
def test_errors_name_the_key(change: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        recipe_from_dict(GOOD | change)


def test_unreadable_recipes_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("sources: [")
    with pytest.raises(ConfigError, match="broken.yaml"):
        load_recipe(tmp_path / "broken.yaml")
    with pytest.raises(ConfigError, match="key.path=value"):
        load_recipe(REPOSITORY / "data" / "python_stdlib.yaml", ["split.validation"])
