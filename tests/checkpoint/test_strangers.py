"""Nothing that came with a checkpoint is run: not from its list of tensors, not from its objects, by no command."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from small_run import small_config, train_here
from strangers import PLACES, Payload, read_list, sign, write_list

from moba_megatron.checkpoint import CheckpointError, Manifest
from moba_megatron.checkpoint.damage import damages
from moba_megatron.checkpoint.manifest import NAME
from moba_megatron.checkpoint.pickles import UnsafePickle, read_objects
from moba_megatron.checkpoint.tensors import StoredTensors
from moba_megatron.config import ConfigError
from moba_megatron.convert.export_hf import export_huggingface
from moba_megatron.convert.exported import open_exported
from moba_megatron.convert.import_megatron import import_megatron
from moba_megatron.generation.loading import load_generator, open_model

SETTINGS = {"training__steps": 4, "model__vocab_size": 128}
ASSETS = Path(__file__).parents[1] / "assets/checkpoints"


@pytest.fixture(scope="module")
def paused(tmp_path_factory):
    """A run that stopped at step 2 of 4."""
    folder = tmp_path_factory.mktemp("paused")
    run_ranks(1, train_here, small_config(folder, training__stop_after=2, **SETTINGS))
    return folder


@pytest.fixture(params=PLACES, ids=lambda place: place.__name__)
def hostile(paused, tmp_path, request):
    """The run's folder with a payload in one place, and the folder that it would make."""
    made = tmp_path / "made by the payload"
    shutil.copytree(paused, tmp_path / "copy")
    folder = tmp_path / "copy/run/checkpoints/step_2"
    request.param(folder, Payload(made))
    sign(folder)
    return tmp_path / "copy/run", made, request.param


def resume(run: Path, out: Path) -> None:
    run_ranks(1, train_here, small_config(run.parent, checkpoint__allow_changed=["data"], **SETTINGS))


def begin(run: Path, out: Path) -> None:
    run_ranks(1, train_here, small_config(out, model__init_from=str(run), **SETTINGS))


def generate(run: Path, out: Path) -> None:
    load_generator(run)


def evaluate(run: Path, out: Path) -> None:
    fingerprint = Manifest.read(run / "checkpoints/step_2").data["tokenizer"]
    run_ranks(1, lambda: bool(open_model(run, fingerprint, 128)), prepare=False)


def export(run: Path, out: Path) -> None:
    export_huggingface(open_exported(run), out / "exported")


def import_it(run: Path, out: Path) -> None:
    """As if it were one of Megatron-LM's."""
    settings = {"model": run, "attention": {"block_size": 16, "top_k": 3}, "sequence_length": 64}
    run_ranks(1, lambda: bool(import_megatron(run / "checkpoints/step_2", out / "in", **settings)), prepare=False)


def inspect(run: Path, out: Path) -> None:
    if problems := damages(run / "checkpoints/step_2"):
        raise CheckpointError("step_2: " + "; ".join(problems))


EVERYWHERE = {"in_list", "instead_of_list"}
# What each entry point reads beside the list of tensors and the tensors.
ENTRY_POINTS = {
    resume: {"in_random_states", "in_extra_states", "in_common_state"},
    begin: {"in_extra_states", "in_common_state"},
    evaluate: {"in_extra_states", "in_common_state"},
    generate: set(),
    export: set(),
    import_it: {"in_common_state"},
    inspect: {"in_random_states", "in_extra_states", "in_common_state"},
}


@pytest.mark.parametrize("entry_point", ENTRY_POINTS, ids=lambda entry_point: entry_point.__name__)
def test_a_payload_is_refused_and_does_nothing(hostile, entry_point, tmp_path):
    run, made, place = hostile
    if place.__name__ in EVERYWHERE | ENTRY_POINTS[entry_point]:
        with pytest.raises((AssertionError, CheckpointError)) as refused:
            entry_point(run, tmp_path)
        said = str(refused.value)
        assert "step_2" in said and ("could run code" in said or "running its code" in said), said
    else:
        entry_point(run, tmp_path)
    assert not made.exists()


def test_the_payloads_work(tmp_path):
    """Read as they are, they do what they say: the test above would see it."""
    with pytest.raises(AttributeError):
        pickle.loads(pickle.dumps(Payload(tmp_path / "made"))).anything  # noqa: B018
    assert (tmp_path / "made").is_dir()


@pytest.mark.parametrize("release", ["0.16", "0.19"])
def test_other_releases_are_read_and_their_payloads_refused(tmp_path, release):
    folder = Path(shutil.copytree(ASSETS / release / "step_4", tmp_path / "step_4"))
    assert damages(folder) == []
    for place in PLACES:
        shutil.rmtree(folder)
        shutil.copytree(ASSETS / release / "step_4", folder)
        place(folder, Payload(tmp_path / "made"))
        sign(folder)
        assert any("could run code" in line for line in damages(folder)), place.__name__
    assert not (tmp_path / "made").exists()


def test_a_payload_that_is_no_class_is_refused(tmp_path):
    """By its name alone, before anything is imported."""
    pickled = b"\x80\x04\x8c\x0cno_such_part\x8c\x04call\x93."
    (tmp_path / ".metadata").write_bytes(pickled)
    with pytest.raises(UnsafePickle, match="it names no_such_part.call, which no checkpoint has"):
        StoredTensors(tmp_path)
    with pytest.raises(UnsafePickle):
        stream = tmp_path / "object"
        torch.save(Payload(tmp_path / "made"), stream)
        read_objects(stream.read_bytes())
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"relative_path": "/etc/hostname"}, "leads out of its folder"),
        ({"relative_path": "../outside"}, "leads out of its folder"),
        ({"relative_path": "link"}, "leads out of its folder"),
        ({"relative_path": 3}, "not a file name"),
        ({"offset": -1}, "places"),
        ({"length": 2**60}, "places"),
        ({"transform_descriptors": ["zstd"]}, "coded form"),
    ],
)
def test_a_list_that_leads_elsewhere_is_refused(paused, tmp_path, change, says):
    folder = Path(shutil.copytree(paused / "run/checkpoints/step_2", tmp_path / "step_2"))
    (tmp_path / "outside").write_bytes(b"secret")
    (folder / "link").symlink_to(tmp_path / "outside")
    metadata = read_list(folder)
    index, place = next((i, p) for i, p in metadata.storage_data.items() if i.fqn.startswith("decoder"))
    metadata.storage_data[index] = replace(place, **change)
    write_list(folder, metadata)
    with pytest.raises(CheckpointError, match=says):
        StoredTensors(folder)


@pytest.mark.parametrize("what", ["sizes", "chunks"])
def test_sizes_that_nothing_is_stored_for_take_no_memory(paused, tmp_path, what):
    folder = Path(shutil.copytree(paused / "run/checkpoints/step_2", tmp_path / "step_2"))
    metadata, key = read_list(folder), "decoder.final_layernorm.weight"
    entry = metadata.state_dict_metadata[key]
    entry.size = torch.Size([2**50])
    if what == "chunks":
        entry.chunks[0].sizes = torch.Size([2**50])
    write_list(folder, metadata)
    with pytest.raises(CheckpointError, match="not stored in whole" if what == "sizes" else "should have"):
        StoredTensors(folder).read(key, [0], [2**50])


def test_other_formats_are_not_asked_for(paused, tmp_path):
    folder = Path(shutil.copytree(paused / "run/checkpoints/step_2", tmp_path / "step_2"))
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')
    with pytest.raises(CheckpointError, match="only torch_dist is read"):
        StoredTensors(folder)
    sign(folder)
    begun = small_config(tmp_path, model__init_from=str(folder), **SETTINGS)
    with pytest.raises(AssertionError, match="only torch_dist is read"):
        run_ranks(1, train_here, begun)


def test_the_manifest_names_files_of_its_folder_only(paused, tmp_path):
    folder = Path(shutil.copytree(paused / "run/checkpoints/step_2", tmp_path / "step_2"))
    manifest = Manifest.read(folder)
    (tmp_path / "outside").write_bytes(b"secret")
    for name in ("../outside", str(tmp_path / "outside")):
        replace(manifest, files={**manifest.files, name: {"bytes": 6, "blake2b": "00"}}).write(folder)
        (line,) = damages(folder)
        assert "leads out of its folder" in line
    (folder / "link").symlink_to(tmp_path / "outside")
    replace(manifest, files={**manifest.files, "link": {"bytes": 6, "blake2b": "00"}}).write(folder)
    assert any("leads out of its folder" in line for line in damages(folder))


def test_an_index_of_safetensors_names_files_of_its_folder_only(tmp_path):
    from moba_megatron.convert.safetensors_folder import INDEX, SafetensorsFolder

    (tmp_path / "model").mkdir()
    (tmp_path / "outside.safetensors").write_bytes(b"secret")
    (tmp_path / "model/link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "link.safetensors"):
        (tmp_path / "model" / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(ConfigError, match="leads out of its folder"):
            SafetensorsFolder(tmp_path / "model")
    (tmp_path / "model" / INDEX).write_text('{"weight_map": {"a": 7}}')
    with pytest.raises(ConfigError, match="not a file name"):
        SafetensorsFolder(tmp_path / "model")


def test_the_cache_of_the_hub_is_made_of_links_and_is_read(tmp_path):
    from safetensors.torch import save_file

    from moba_megatron.convert.safetensors_folder import INDEX, SafetensorsFolder

    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/1234"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save_file({"a": torch.ones(2)}, blobs / "77")
    (blobs / "78").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    (snapshot / "model-1.safetensors").symlink_to("../../blobs/77")
    (snapshot / INDEX).symlink_to("../../blobs/78")
    assert SafetensorsFolder(snapshot).read("a").tolist() == [1, 1]


def test_readers_say_what_is_wrong_whatever_is_in_a_file(tmp_path):
    """Bytes changed, added and taken out at random, digests written anew: an error of ours or none at all."""
    draw = random.Random(0)
    folder = Path(shutil.copytree(ASSETS / "0.16/step_4", tmp_path / "step_4"))
    found = []
    for number in range(40):
        path = folder / (".metadata", "common.pt", "metadata.json", NAME)[number % 4]
        before, manifest = path.read_bytes(), (folder / NAME).read_bytes()
        content = bytearray(before)
        for _ in range(draw.choice([1, 3])):
            place = draw.randrange(len(content))
            content[place : place + draw.choice([0, 1, 4])] = draw.randbytes(draw.choice([0, 1, 4]))
        path.write_bytes(bytes(content))
        if path.name != NAME:
            sign(folder)
        found.append(bool(damages(folder)))
        path.write_bytes(before)
        (folder / NAME).write_bytes(manifest)
    assert sum(found) > 10
