from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import typer
import yaml
from megatron.core.datasets.indexed_dataset import IndexedDataset
from prepare_examples import changed
from small_run import small_config
from typer.testing import CliRunner

from moba_megatron.config import BlendEntry, ConfigError
from moba_megatron.corpus.blend import blend_entries
from moba_megatron.corpus.indexed import load_index, read_index
from moba_megatron.corpus.inspect import check_dataset, read_document
from moba_megatron.corpus.loss_mask import open_loss_mask
from moba_megatron.corpus.manifest import load_manifest
from moba_megatron.corpus.mix import make_blend
from moba_megatron.corpus.mix_views import Mix, length_shares, load_mix, make_views
from moba_megatron.corpus.prepare import prepare
from moba_megatron.corpus.prepare_command import blend_command
from moba_megatron.corpus.recipe import Recipe
from moba_megatron.corpus.tokenizer import Tokenizer, train_bpe
from moba_megatron.corpus.workspace import hold
from moba_megatron.data.datasets import build_datasets, check_data


@pytest.fixture
def two_datasets(recipe: Recipe, text_folder: Path, tmp_path: Path) -> list[str]:
    """Prefixes of two prepared datasets with the same tokenizer, one with a loss mask."""
    folders = [str(text_folder / name) for name in ("part0", "part1", "part2")]
    sources = [{"kind": "files", "path": path} for path in folders]
    prepare(changed(recipe, sources=sources[:2]), tmp_path / "one", workers=1)
    rows = [{"a": "question ", "b": "answer " * 40 * n} for n in range(1, 9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    masked = {"kind": "jsonl", "path": str(tmp_path / "rows.jsonl"), "prompt_column": "a", "answer_column": "b"}
    prepare(changed(recipe, sources=[masked], split={"validation": 0.0}), tmp_path / "two", workers=1)
    return [str(tmp_path / name / "train") for name in ("one", "two")]


def test_entries_of_prefixes_lists_and_files(tmp_path: Path):
    # Numbers as in a configuration: plain YAML takes 1e+0 for a word.
    (tmp_path / "blend.yaml").write_text("entries:\n- {path: a, weight: 3}\n- {path: /b, weight: 1e+0}\n")
    assert blend_entries(None) == []
    assert blend_entries("data/train") == [BlendEntry(path="data/train", weight=1.0)]
    found = [BlendEntry(path=f"{tmp_path}/a", weight=3.0), BlendEntry(path="/b", weight=1.0)]
    assert blend_entries(str(tmp_path / "blend.yaml")) == found
    both = blend_entries([BlendEntry(path=str(tmp_path / "blend.yaml"), weight=2.0), BlendEntry(path="c")])
    assert [entry.weight for entry in both] == [1.5, 0.5, 1.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("entries: []", "is not a blend file"),
        ("- {path: a}", "is not a blend file"),
        ("entries: [", "is not a blend file"),
        ("entries: [{path: a, weight: 0}]", "is not a blend file"),
        ("entries: [{path: a, path: b}]", "is not a blend file.*found duplicate key path"),
        ("entries: [{path: '${nowhere}'}]", "is not a blend file.*'nowhere' not found"),
    ],
)
def test_blends_that_name_nothing(tmp_path: Path, text: str, message: str):
    (tmp_path / "blend.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        blend_entries(str(tmp_path / "blend.yaml"))
    with pytest.raises(ConfigError, match="no such blend file"):
        blend_entries(str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match="the blend is empty"):
        blend_entries([])


def test_sources_keep_their_shares_and_long_documents_gain():
    mix = Mix.model_validate(
        {
            "sources": [{"path": "x/train", "weight": 3.0}, {"path": "y/train", "weight": 1.0}],
            "lengths": [{"at_least": 100, "upsample": 4.0}],
        }
    )
    lengths = [np.array([50, 50, 300], np.int32), np.array([60, 20], np.int32)]
    views = make_views(mix, lengths)
    assert [view.name for view in views] == ["x-1", "x-100", "y-1"]
    assert [view.documents.tolist() for view in views] == [[0, 1], [2], [0, 1]]
    # Of x a quarter of the tokens are short; long ones count four times: 100 against 1200.
    assert [view.weight for view in views] == pytest.approx([0.75 / 13, 0.75 * 12 / 13, 0.25])
    natural, read = length_shares(views)
    assert natural[8] == 300 / 480 and read[8] == pytest.approx(0.75 * 12 / 13)
    assert natural.sum() == pytest.approx(1) and read.sum() == pytest.approx(1)
    dropped = Mix.model_validate(
        mix.model_dump() | {"lengths": [{"at_least": 1, "upsample": 0.0}, {"at_least": 55, "upsample": 1.0}]}
    )
    assert [view.documents.tolist() for view in make_views(dropped, lengths)] == [[2], [0]]
    nothing = Mix.model_validate(
        mix.model_dump() | {"lengths": [{"at_least": 1, "upsample": 0.0}, {"at_least": 100, "upsample": 1.0}]}
    )
    with pytest.raises(ValueError, match=r"y/train has no document of a length in use \(its longest has 60"):
        make_views(nothing, lengths)


def test_views_read_as_megatron_core_reads_them(two_datasets: list[str], tmp_path: Path):
    mix = Mix.model_validate(
        {"sources": [{"path": path} for path in two_datasets], "lengths": [{"at_least": 400, "upsample": 5.0}]}
    )
    out = tmp_path / "blend"
    report = make_blend(mix, out)
    assert "one-1 " in report and "two-400 " in report and "is read" in report
    entries = blend_entries(str(out / "blend.yaml"))
    assert sum(entry.weight for entry in entries) == pytest.approx(1)
    seen = {path: 0 for path in two_datasets}
    for entry in entries:
        name, edge = Path(entry.path).name.split("-")
        prefix = next(path for path in two_datasets if Path(path).parent.name == name)
        source, view = IndexedDataset(prefix), IndexedDataset(entry.path)
        lengths = source.sequence_lengths
        wanted = np.flatnonzero((lengths >= 400) if edge == "400" else (lengths < 400))
        assert len(view) == wanted.size and view.document_indices.tolist() == list(range(wanted.size + 1))
        for number, document in enumerate(wanted):
            assert np.array_equal(np.array(view[number]), np.array(source[int(document)]))
        seen[prefix] += wanted.size
        summary = read_index(entry.path)
        assert summary.documents == wanted.size and summary.stored_tokens == lengths.sum() > summary.tokens
        assert not (Path(f"{entry.path}.bin").readlink().is_absolute())
        assert (open_loss_mask(entry.path) is None) == (name == "one")
    assert seen == {path: load_index(path).lengths.size for path in two_datasets}
    manifest = load_manifest(out)
    assert manifest.tokenizer.fingerprint == Tokenizer(out / "tokenizer").fingerprint
    assert [stats.target_tokens is None for stats in manifest.splits.values()] == [True, True, False, False]
    assert all(wrong is None for _, wrong in check_dataset(out))
    assert [piece.counts for piece in read_document(out, "two-400", 0)] == [False, True]
    # The folders may move together.
    (tmp_path / "elsewhere").mkdir()
    for name in ("one", "two", "blend"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    assert all(wrong is None for _, wrong in check_dataset(tmp_path / "elsewhere/blend"))
    shutil.rmtree(tmp_path / "elsewhere/one")
    with pytest.raises(ValueError, match="missing .*one-1.bin"):
        read_index(tmp_path / "elsewhere/blend/one-1")


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_training_reads_the_documents_of_a_blend_with_their_masks(
    two_datasets: list[str], tmp_path: Path, packing: str
):
    mix = {"sources": [{"path": path} for path in two_datasets], "lengths": [{"at_least": 400, "upsample": 50.0}]}
    make_blend(Mix.model_validate(mix), tmp_path / "blend")
    config = small_config(
        tmp_path,
        data__train=str(tmp_path / "blend/blend.yaml"),
        data__validation=None,
        data__tokenizer=str(tmp_path / "blend/tokenizer"),
        data__sequence_length=128,
        data__packing=packing,
    )
    check_data(config)
    train, _ = build_datasets(config)
    streams = [np.fromfile(f"{path}.bin", np.uint16) for path in two_datasets]
    masks = [np.ones(streams[0].size), np.array(open_loss_mask(two_datasets[1]))]
    long, found = 0, 0
    for number in range(32):
        sample = train[number]
        # A stretch of 40 tokens is enough to know its place.
        tokens, counts = sample["labels"].numpy()[:40], sample["loss_mask"].numpy()[:40]
        for stream, mask in zip(streams, masks, strict=True):
            windows = np.lib.stride_tricks.sliding_window_view(stream, tokens.size)
            places = np.flatnonzero((windows == tokens).all(axis=1))
            if places.size:
                found += 1
                expected = {tuple(mask[place : place + tokens.size]) for place in places}
                assert tuple(counts) in expected
        long += (sample["tokens"].numpy() != Tokenizer(tmp_path / "blend/tokenizer").eod_id).all()
    assert found >= 16
    # A row of nothing but one document can only come from a long one.
    assert long >= 16


def test_a_blend_is_made_once_and_refuses_what_does_not_fit(two_datasets: list[str], recipe: Recipe, tmp_path: Path):
    mix, out = Mix.model_validate({"sources": [{"path": two_datasets[0]}]}), tmp_path / "blend"
    make_blend(mix, out)
    assert "already holds this blend" in make_blend(mix, out)
    other = Mix.model_validate({"sources": [{"path": two_datasets[1]}]})
    with pytest.raises(ValueError, match=r"another dataset \(mix.sources, sources\).*--overwrite"):
        make_blend(other, out)
    assert "wrote" in make_blend(other, out, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir() if "blend" in path.name) == ["blend"]
    assert not (out / "lock").exists()
    with hold(tmp_path / "blend.unfinished", out), pytest.raises(ValueError, match="another process is making"):
        make_blend(mix, out, overwrite=True)
    # Neither the folder of a source, nor that of the data behind a view, nor one around them.
    before = {path: path.read_bytes() for path in (tmp_path / "one").rglob("*") if path.is_file()}
    make_blend(mix, out, overwrite=True)
    view = Mix.model_validate({"sources": [{"path": str(out / "one-1")}]})
    for recipe_of, place in ((mix, "one"), (mix, "two/../one"), (view, "one"), (view, "blend"), (mix, ".")):
        with pytest.raises(ValueError, match="a blend needs a folder of its own"):
            make_blend(recipe_of, tmp_path / place, overwrite=True)
    assert before == {path: path.read_bytes() for path in before}
    short = train_bpe(["some text to train on, once"], 257 + 4, tmp_path / "short")
    strange = changed(recipe, tokenizer={"kind": "pretrained", "path": str(short.folder)})
    prepare(strange, tmp_path / "three", workers=1)
    mixed = Mix.model_validate({"sources": [{"path": two_datasets[0]}, {"path": str(tmp_path / "three/train")}]})
    with pytest.raises(ValueError, match="three/train was made with another tokenizer"):
        make_blend(mixed, tmp_path / "new")
    (tmp_path / "three/manifest.json").unlink()
    with pytest.raises(ValueError, match="three/train: no manifest.json beside it"):
        make_blend(mixed, tmp_path / "new")


def test_the_command_and_its_errors(two_datasets: list[str], tmp_path: Path):
    app = typer.Typer()
    app.command()(blend_command)
    recipe = tmp_path / "mix.yaml"

    def run(values: object, *more: str) -> tuple[int, str]:
        recipe.write_text(yaml.safe_dump(values))
        result = CliRunner().invoke(app, [str(recipe), str(tmp_path / "out"), *more])
        return result.exit_code, result.output

    good = {"sources": [{"path": two_datasets[0]}]}
    assert run({"sources": []})[0] == 2
    code, text = run({"sources": good["sources"] * 2})
    assert code == 2 and "two sources are called 'one'" in text
    code, text = run(good | {"lengths": [{"at_least": 9, "upsample": 1}, {"at_least": 5, "upsample": 1}]})
    assert code == 2 and "must rise" in text
    code, text = run({"sources": [{"path": two_datasets[0], "weight": 0.5}, {"path": two_datasets[1]}]})
    assert code == 2 and "sources.1.weight is not given, but others are" in text
    code, text = run({"sources": [{"path": str(tmp_path / "nowhere/train")}]})
    assert code == 2 and "nowhere/train: no manifest.json" in text
    code, text = run(good, "sources.0.name=mine")
    assert code == 0 and "mine-1" in text
    assert load_mix(recipe).ranges == [(1, 2**31, 1.0)]
