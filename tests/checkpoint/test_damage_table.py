"""Every file of a checkpoint and of an export, one bit flipped or cut, at its start, middle and end: what finds it, and
where it may stay.

What is allowed not to matter:
- README.md of an export: a card for people, which they edit; nothing is computed from it.
- config.json, generation_config.json, tokenizer_config.json of an export that is not a run's own: people edit them
  (decode mode, length, sampling), and what they say shows; weights, index and vocabulary nobody writes by hand.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from distributed import run_ranks
from small_run import small_config, train_here

from moba_megatron.checkpoint import CheckpointError, Manifest
from moba_megatron.checkpoint.damage import damages
from moba_megatron.checkpoint.manifest import NAME, misplaced_files, verify
from moba_megatron.convert.export_digests import SOURCE, check_export
from moba_megatron.convert.export_hf import export_huggingface
from moba_megatron.convert.exported import open_exported
from moba_megatron.convert.import_hf import import_huggingface
from moba_megatron.convert.run_exports import export_in_run
from moba_megatron.generation.loading import load_generator

CHECKPOINT = (".metadata", "__0_0.distcp", "__0_1.distcp", "common.pt", "metadata.json")
EXPORT = ("config.json", "generation_config.json", "model-00001-of-00002.safetensors",
          "model-00002-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json",
          "tokenizer_config.json")  # fmt: skip
EDITED = {"config.json", "generation_config.json", "tokenizer_config.json"}
PLACES = {"start": 0.0, "middle": 0.5, "end": 1.0}
KINDS = ("flipped", "cut")


@contextmanager
def damaged(path: Path, kind: str, place: float) -> Iterator[None]:
    """One bit of a byte flipped, or everything from there on cut off; as it was afterwards."""
    content = path.read_bytes()
    number = min(int(len(content) * place), len(content) - 1)
    bad = content[:number] + bytes([content[number] ^ 1]) + content[number + 1 :]
    path.write_bytes(bad if kind == "flipped" else content[:number])
    try:
        yield
    finally:
        path.write_bytes(content)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that stopped at step 2 of 4."""
    config = small_config(tmp_path_factory.mktemp("paused"), training__steps=4, training__stop_after=2)
    run_ranks(1, train_here, config)
    return config


@pytest.fixture(scope="module")
def checkpoint(run):
    return Path(run.run.dir) / "checkpoints/step_2"


@pytest.fixture(scope="module")
def export(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "out"
    export_huggingface(open_exported(run.run.dir), folder, shard_bytes=100_000)
    return folder


def test_the_tables_name_every_file(checkpoint, export):
    common = {"common.pt"} if (checkpoint / "common.pt").is_file() else set()
    assert {path.name for path in checkpoint.iterdir()} - {NAME} <= {*CHECKPOINT}
    assert {path.name for path in checkpoint.iterdir()} >= {".metadata", "__0_0.distcp", "metadata.json", *common}
    assert {path.name for path in export.iterdir()} == {*EXPORT, SOURCE, "README.md"}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CHECKPOINT)
def test_a_file_of_a_checkpoint(checkpoint, name, kind, place):
    """Its digest finds it, which resume, init_from, evaluate, generate and export ask; a cut is found without."""
    if not (checkpoint / name).is_file():
        pytest.skip(f"this megatron-core writes no {name}")
    manifest = Manifest.read(checkpoint)
    with damaged(checkpoint / name, kind, PLACES[place]):
        (line,) = verify(checkpoint, manifest)
        assert line.startswith(name)
        assert any(name in line for line in damages(checkpoint))
        assert bool(misplaced_files(checkpoint, manifest)) == (kind == "cut")
    assert verify(checkpoint, manifest) == []


@pytest.mark.parametrize("kind", KINDS)
def test_any_byte_of_the_manifest(checkpoint, kind):
    """Its own digest finds it, at every byte: as JSON that cannot be read, or as values that have changed."""
    size = (checkpoint / NAME).stat().st_size
    for number in [*range(0, size, 13), size - 1]:
        with damaged(checkpoint / NAME, kind, number / size), pytest.raises(CheckpointError, match="damaged|format"):
            Manifest.read(checkpoint)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", NAME])
def test_no_door_opens_a_damaged_checkpoint(run, checkpoint, tmp_path, name):
    begun = small_config(tmp_path, training__steps=4, model__init_from=str(checkpoint))
    with damaged(checkpoint / name, "flipped", 0.5):
        for start in (run, begun):
            with pytest.raises((AssertionError, ValueError), match="is damaged"):
                run_ranks(1, train_here, start)
        with pytest.raises(CheckpointError, match="is damaged"):
            load_generator(checkpoint)
        with pytest.raises(CheckpointError, match="is damaged"):
            export_huggingface(open_exported(checkpoint), tmp_path / "out")


def test_a_start_may_leave_digests_alone_but_not_the_list_of_files(checkpoint, tmp_path):
    """checkpoint.verify = false and --no-verify save the reading, and nothing else."""
    copy = Path(shutil.copytree(checkpoint, tmp_path / "step_2"))
    random_part = (copy / "__0_0.distcp").read_bytes().rfind(b"PK\x05\x06") + 20
    content = bytearray((copy / "__0_0.distcp").read_bytes())
    content[random_part] ^= 1
    (copy / "__0_0.distcp").write_bytes(content)
    with pytest.raises(CheckpointError, match="has changed since it was written"):
        open_exported(copy).check_files()
    open_exported(copy).check_files(digests=False)
    (copy / "surplus").write_text("")
    with pytest.raises(CheckpointError, match="surplus is not in checkpoint.json"):
        open_exported(copy).check_files(digests=False)
    (copy / "surplus").unlink()
    (copy / "metadata.json").unlink()
    with pytest.raises(CheckpointError, match="metadata.json is missing"):
        open_exported(copy).check_files(digests=False)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*EXPORT, SOURCE])
def test_a_file_of_an_export(export, name, kind, place):
    """A run's own export is held as a whole when it is used again; of others, what nobody writes by hand."""
    with damaged(export / name, kind, PLACES[place]):
        with pytest.raises(CheckpointError, match=f"{name}.*(changed since|bytes, .* were written|damaged)|damaged"):
            check_export(export, whole=True)
        if name in EDITED:
            check_export(export)
        else:
            with pytest.raises(CheckpointError, match="damaged"):
                check_export(export)
    check_export(export, whole=True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_card_of_an_export_is_for_people(export, kind):
    with damaged(export / "README.md", kind, 0.5):
        check_export(export, whole=True)


def test_a_damaged_export_is_not_generated_from_unless_asked(export):
    name = "model-00001-of-00002.safetensors"
    with damaged(export / name, "flipped", 0.9):
        with pytest.raises(CheckpointError, match=f"{name} has changed since it was written.*--no-verify"):
            load_generator(export)
        load_generator(export, verify=False)


def test_a_damaged_export_is_not_begun_with_or_imported(export, tmp_path):
    name = "model-00001-of-00002.safetensors"
    with damaged(export / name, "flipped", 0.9):
        begun = small_config(tmp_path, training__steps=4, model__init_from=str(export))
        with pytest.raises(AssertionError, match=f"{name} has changed since it was written"):
            run_ranks(1, train_here, begun)
        with pytest.raises(AssertionError, match=f"{name} has changed since it was written"):
            run_ranks(1, import_huggingface, export, tmp_path / "in", prepare=False)
    assert not (tmp_path / "in").exists()


def test_a_damaged_export_is_not_used_again(run):
    exported = open_exported(run.run.dir)
    folder = export_in_run(exported)
    assert export_in_run(exported) == folder
    with damaged(folder / "model.safetensors", "flipped", 0.9):
        with pytest.raises(CheckpointError, match="model.safetensors has changed since it was written"):
            export_in_run(exported)
        assert export_in_run(exported, verify=False) == folder
    (folder / SOURCE).unlink()
    with pytest.raises(CheckpointError, match="not the export of"):
        export_in_run(exported)
    shutil.rmtree(folder)
    assert export_in_run(exported) == folder
