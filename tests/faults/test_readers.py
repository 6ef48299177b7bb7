"""Readers against noise: files of every format that we read, damaged at random. A reader takes one, or refuses it by a
message; it neither dies nor hangs nor takes memory that the file does not have.

`MOBA_FUZZ_SECONDS` says how long each reader is tried in `make test-faults`; without it, some hundred files.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file
from small_run import TOKENS, small_values

from moba_megatron.config import load_config
from moba_megatron.config.huggingface import model_section, read_huggingface_config
from moba_megatron.config.reading import read_plain_yaml, read_tree
from moba_megatron.convert.safetensors_folder import SafetensorsFolder
from moba_megatron.corpus.blend import blend_entries
from moba_megatron.corpus.documents import Part
from moba_megatron.corpus.indexed import foreign_id, load_index, write_index
from moba_megatron.corpus.jsonl import read_jsonl
from moba_megatron.corpus.manifest import MANIFEST_FILE, load_manifest
from moba_megatron.corpus.prepare import prepare
from moba_megatron.corpus.recipe import load_recipe, recipe_from_dict
from moba_megatron.corpus.rows import RowReader
from moba_megatron.corpus.tokenizer import Tokenizer
from moba_megatron.errors import explained
from moba_megatron.runs.files import read_json, read_json_lines

FILES = 150
SLOWEST = 10.0
"""Seconds that a reader may take for one file, on a machine with other work."""
MEMORY = 2 * 2**30
"""Bytes of address space beyond those at the start."""
_TEXTS = (b"{", b"}", b"[", b"]", b'"', b":", b",", b"\0", b"\xff", b"\n", b"&a ", b"*a", b"!!python/object:os ", b"- ",
          b"1e999", b"-1", b"NaN", b"null", b"\\ud800", b"${x}", b"<<: ", b"9" * 400, b"[" * 300)  # fmt: skip


def damaged(data: bytes, draw: random.Random) -> bytes:
    """A file with one to four wounds."""
    for _ in range(draw.choice((1, 1, 2, 4))):
        at, end = sorted((draw.randrange(len(data) + 1), draw.randrange(len(data) + 1)))
        piece = bytearray(data)
        match draw.randrange(7):
            case 0:
                if at < len(piece):
                    piece[at] ^= 1 << draw.randrange(8)
            case 1:
                del piece[at:]
            case 2:
                del piece[at : min(end, at + 64)]
            case 3:
                piece[at:at] = draw.choice(_TEXTS)
            case 4:
                piece[at : at + 8] = draw.choice((2**60, 2**63, 2**64 - 1, 1, 0)).to_bytes(8, "little")
            case 5:
                piece[at:at] = piece[at : min(end, at + 4096)]
            case 6:
                piece[at : at + 16] = draw.randbytes(16)
        data = bytes(piece)
    return data


def _tokens(folder: Path) -> None:
    write_index(folder / "train", np.dtype("<u2"), 40, lambda: [np.full(40, 7, np.int32)])
    np.zeros(280, np.uint16).tofile(folder / "train.bin")


def _weights(folder: Path) -> None:
    tensors = {f"layers.{n}.weight": np.zeros((2, 3), np.float32) for n in range(4)}
    for number, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor}, folder / f"model-{number}.safetensors")
    files = {name: f"model-{number}.safetensors" for number, name in enumerate(tensors)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def _read_rows(path: Path) -> list[Any]:
    recipe = recipe_from_dict({
        "sources": [{"kind": "jsonl", "path": str(path)}],
        "tokenizer": {"kind": "pretrained", "path": str(TOKENS / "tokenizer")},
        "filters": {"max_row_bytes": 1000},
    })  # fmt: skip
    reader = RowReader(recipe.sources[0], recipe.filters, None)
    return list(read_jsonl(reader, Part(0, (str(path),), 0, path.stat().st_size, 0), lambda done: None))


HUGGING = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "rope_theta": 1e4,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "auto_map": {},
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192},
}  # fmt: skip
ROWS = b"".join(
    json.dumps({"text": f"row {n} " + "x" * n, "n": n, "deep": [[{"a": n}]]}).encode() + b"\n" for n in range(30)
)
LINES = b"".join(json.dumps({"step": n, "loss": 1 / (n + 1)}).encode() + b"\n" for n in range(30))

# Of each format: the file, what makes it, and what reads it.
READERS: dict[str, tuple[str, Callable[[Path], Any], Callable[[Path], Any]]] = {
    "index": (
        "train.idx",
        _tokens,
        lambda path: (load_index(path.with_suffix("")), foreign_id(path.with_suffix(""), 5)),
    ),
    "configuration": (
        "c.yaml",
        lambda folder: (folder / "c.yaml").write_text(yaml.safe_dump(small_values(folder))),
        load_config,
    ),
    "yaml": (
        "a.yaml",
        lambda folder: (folder / "a.yaml").write_text("a: &a [1, 2]\nb: {c: *a, d: 1e-3}\ne: |\n  text\n"),
        lambda path: (read_tree(path), read_plain_yaml(path)),
    ),
    "recipe": (
        "r.yaml",
        lambda folder: (folder / "r.yaml").write_text(
            "sources: [{kind: jsonl, path: a}]\ntokenizer: {kind: bpe, vocab_size: 300}\nsplit: {validation: 0.1}\n"
        ),
        load_recipe,
    ),
    "blend": (
        "b.yaml",
        lambda folder: (folder / "b.yaml").write_text("entries:\n- {path: a, weight: 0.3}\n- {path: b, weight: 0.7}\n"),
        lambda path: blend_entries(str(path)),
    ),
    "config.json": (
        "config.json",
        lambda folder: (folder / "config.json").write_text(json.dumps(HUGGING)),
        lambda path: model_section(read_huggingface_config(path.parent)),
    ),
    "tokenizer": (
        "tokenizer.json",
        lambda folder: shutil.copytree(TOKENS / "tokenizer", folder, dirs_exist_ok=True),
        lambda path: Tokenizer(path.parent).fingerprint,
    ),
    "safetensors index": (
        "model.safetensors.index.json",
        _weights,
        lambda path: SafetensorsFolder(path.parent),
    ),
    "rows": ("rows.jsonl", lambda folder: (folder / "rows.jsonl").write_bytes(ROWS), _read_rows),
    "metrics": ("m.jsonl", lambda folder: (folder / "m.jsonl").write_bytes(LINES), read_json_lines),
    "status": (
        "s.json",
        lambda folder: (folder / "s.json").write_text('{"state": "running", "step": 5, "pid": 77}'),
        read_json,
    ),
}


@pytest.fixture
def little_memory() -> Iterator[None]:
    """A count of 2^60 that is taken for a size ends in a MemoryError and not in a machine without memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def fuzz(name: str, folder: Path, make: Callable[[Path], Any], read: Callable[[Path], Any], seed: int) -> int:
    """Damage a file again and again until the time is up; how many of them were refused."""
    make(folder)
    path = folder / name
    whole, draw, refused = path.read_bytes(), random.Random(seed), 0
    seconds = float(os.environ.get("MOBA_FUZZ_SECONDS", "0"))
    deadline = time.monotonic() + seconds
    number = 0
    while time.monotonic() < deadline if seconds else number < FILES:
        number += 1
        data = damaged(whole, draw)
        path.write_bytes(data)
        start = time.monotonic()
        try:
            read(path)
        except Exception as error:
            said = explained(error)
            path.with_suffix(".wrong").write_bytes(data)
            assert said is not None, f"{name} number {number}: {type(error).__name__}: {error} of {path}"
            assert not isinstance(error, MemoryError), f"{name} number {number}: {said}"
            assert any(word in said for word in (name, path.stem, str(folder), " = ", ": ")), said
            refused += 1
        assert time.monotonic() - start < SLOWEST, f"{name} number {number} took {time.monotonic() - start:.1f} s"
    path.write_bytes(whole)
    read(path)
    return refused


@pytest.mark.parametrize("format", READERS)
def test_noise_is_read_or_refused(format: str, tmp_path: Path, little_memory: None):
    name, make, read = READERS[format]
    refused = fuzz(name, tmp_path, make, read, seed=len(format))
    # Rows that are none are passed over and counted.
    assert refused > 0 or format == "rows"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "rows.jsonl").write_bytes(ROWS * 5)
    recipe = recipe_from_dict({
        "sources": [{"kind": "jsonl", "path": str(folder / "rows.jsonl")}],
        "tokenizer": {"kind": "pretrained", "path": str(TOKENS / "tokenizer")},
        "split": {"validation": 0.2},
    })  # fmt: skip
    prepare(recipe, folder / "set", workers=1)
    return folder / "set"


def test_a_manifest_with_any_damage_is_refused_or_says_the_same(dataset: Path, little_memory: None):
    """Its digest finds all that changes a value."""
    expected = load_manifest(dataset)
    data = (dataset / MANIFEST_FILE).read_bytes()

    def read(path: Path) -> None:
        assert load_manifest(path.parent) == expected

    assert fuzz(MANIFEST_FILE, dataset, lambda folder: (folder / MANIFEST_FILE).write_bytes(data), read, seed=1) > 0
