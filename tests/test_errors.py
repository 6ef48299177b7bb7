"""Error handling of commands: which errors become a message, and which keep their traceback."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import typer
import yaml
import zstandard
from safetensors import safe_open
from small_run import small_values

from moba_megatron.config import Config, ConfigError, LoggingConfig
from moba_megatron.corpus.indexed import sync, write
from moba_megatron.errors import explained, user_errors, with_note
from moba_megatron.platform.launched import check_launch
from moba_megatron.runs.trackers import check_trackers

ROOT = Path(__file__).parents[1]
TINY = 64 * 1024


def caught(call: Any) -> BaseException:
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    path = tmp_path / "damaged"
    path.write_bytes(b"neither \xff this nor that")
    return path


READERS = {
    "json": lambda path: json.loads(path.read_bytes()[9:]),
    "yaml": lambda path: yaml.safe_load("a: ["),
    "utf-8": lambda path: path.read_text(encoding="utf-8"),
    "safetensors": lambda path: safe_open(str(path), "pt"),
    "parquet": lambda path: pyarrow.parquet.read_table(path),
    "zstd": lambda path: zstandard.ZstdDecompressor().decompress(path.read_bytes()),
    "pydantic": lambda path: Config.model_validate({}),
    "no memory": lambda path: np.empty(2**60, np.uint8),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_what_libraries_say_of_files_is_a_message(damaged: Path, read: Any):
    assert explained(caught(lambda: read(damaged)))


def _bugs() -> dict[str, Any]:
    return {
        "key": lambda: {}["a"],
        "attribute": lambda: None.a,
        "index": lambda: [][0],
        "type": lambda: 1 + "a",
        "division": lambda: 1 // 0,
        "assertion": lambda: (_ for _ in ()).throw(AssertionError("no")),
        "value of numpy": lambda: np.zeros(3) + np.zeros(4),
        "recursion": lambda: _again(),
        "runtime": lambda: (_ for _ in ()).throw(RuntimeError("something")),
    }


def _again() -> None:
    _again()


@pytest.mark.parametrize("bug", _bugs().values(), ids=_bugs())
def test_a_bug_keeps_its_traceback(bug: Any):
    error = caught(bug)
    assert explained(error) is None
    with pytest.raises(type(error)), user_errors():
        raise error


def test_a_port_in_use_is_a_message(monkeypatch: pytest.MonkeyPatch):
    import torch.distributed as dist

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        error = caught(lambda: dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False))
    assert f"MASTER_PORT = {port} is in use" in explained(error)


def test_a_value_error_is_a_message_where_our_code_raises_it_and_else_a_bug():
    from moba_megatron.corpus.prepare_command import parse_share
    from moba_megatron.data.packing import row_order

    assert explained(caught(lambda: parse_share("x"))).startswith("--shard x: give I/N")
    # NumPy refuses the seed below our code.
    assert explained(caught(lambda: row_order(3, 3, -1))) is None


def test_what_a_worker_raises_is_told_apart_as_well():
    from moba_megatron.corpus.prepare_command import parse_share
    from moba_megatron.data.packing import row_order

    with ProcessPoolExecutor(1) as pool:
        assert "give I/N" in explained(caught(pool.submit(parse_share, "x").result))
        assert explained(caught(pool.submit(row_order, 3, 3, -1).result)) is None


SYSTEM = {
    "missing": (lambda folder: open(folder / "none"), "none: no such file or folder: correct the path"),
    "folder": (lambda folder: open(folder), "is a folder, not a file"),
    "below a file": (lambda folder: open(folder / "file/x"), "file/x: leads through a file"),
    "too long": (lambda folder: open(folder / ("x" * 300)), "has a name that is too long"),
    "zero": (lambda folder: open(f"{folder}/a\0b"), "null byte"),
    "loop": (lambda folder: open(folder / "loop"), "is a link to itself"),
    "there": (lambda folder: os.mkdir(folder), "exists already"),
    "not empty": (lambda folder: os.rmdir(folder), "is a folder that is not empty"),
}


@pytest.mark.parametrize(("call", "said"), SYSTEM.values(), ids=SYSTEM)
def test_errors_of_the_system_name_the_file_and_the_fix(tmp_path: Path, call: Any, said: str):
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    text = explained(caught(lambda: call(tmp_path)))
    assert said in text and (str(tmp_path) in text or said == "null byte")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EMFILE, errno.ESTALE])
def test_what_a_test_as_root_cannot_make_happen_is_told_alike(number: int):
    text = explained(OSError(number, os.strerror(number), "/some/file"))
    assert text.startswith("/some/file: ") and text.count(":") >= 2


@pytest.fixture
def full_disk(tmp_path: Path) -> Any:
    """A file system of 64 KiB; where none can be mounted, /dev/full stands for a file on one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={TINY}", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        (folder / "data").symlink_to("/dev/full")
    yield folder
    if not mounted.returncode:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_says_which_file_how_much_was_needed_and_how_much_is_there(full_disk: Path):
    def fill() -> None:
        with open(full_disk / "data", "wb", buffering=0) as file:
            for _ in range(100):
                write(file, b"x" * 4096)
            sync(file)

    text = explained(caught(fill))
    assert f"{full_disk}/data: the disk is full (4,096 bytes were to be written, " in text and "are free)" in text


def fill_by_text(folder: Path) -> None:
    (folder / "data").write_text("x" * 10 * TINY)


def fill_by_numpy(folder: Path) -> None:
    np.save(folder / "data", np.zeros(10 * TINY)) if not (folder / "data").is_symlink() else fill_by_text(folder)


def fill_by_a_close(folder: Path) -> None:
    with open(folder / "data", "w", buffering=100 * TINY) as file:
        file.write("x" * 10 * TINY)


@pytest.mark.parametrize("fill", [fill_by_text, fill_by_numpy, fill_by_a_close])
def test_a_full_disk_names_the_file_where_the_system_does_not(full_disk: Path, fill: Any):
    assert f"{full_disk}/data" in explained(caught(lambda: fill(full_disk)))


@pytest.mark.parametrize("error", [
    OSError("8192 requested and 512 written"),  # NumPy
    RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"),  # torch.save
    RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),  # Rust
], ids=["numpy", "torch", "rust"])  # fmt: skip
def test_a_full_disk_in_the_words_of_libraries(error: Exception):
    assert "the disk is full" in explained(error)


def test_the_door_ends_a_command(capsys: pytest.CaptureFixture):
    @user_errors()
    def command(what: str) -> str:
        """Help."""
        with with_note("run it again"):
            if what == "stop":
                raise KeyboardInterrupt
            return open(what).read()

    for what, code, said in (("/none", 2, "error: /none: no such file or folder: correct the path; run it again\n"),
                             ("stop", 130, "stopped; run it again\n")):  # fmt: skip
        with pytest.raises(typer.Exit) as ended:
            command(what)
        assert (ended.value.exit_code, capsys.readouterr().err) == (code, said)
    assert command.__doc__ == "Help."


def test_every_command_goes_through_the_door():
    from moba_megatron.cli import COMMANDS

    functions = [command for command in COMMANDS.values() if not isinstance(command, typer.Typer)]
    groups = [command for command in COMMANDS.values() if isinstance(command, typer.Typer)]
    functions += [command.callback for group in groups for command in group.registered_commands]
    assert len(functions) >= 15
    for function in functions:
        assert function.__code__.co_name == "inner" and hasattr(function, "__wrapped__"), function


LAUNCHED = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
            "MASTER_PORT": "29500"}  # fmt: skip
WRONG = [
    *({name: value} for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
      for value in ("x", "", "-1", "1.5", "0x1", " ")),
    *({name: None} for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "RANK")),
    {"WORLD_SIZE": "0"},
    {"RANK": "2"},
    {"LOCAL_RANK": "2"},
    {"MASTER_PORT": "65536"},
    {"MASTER_ADDR": "no.such.host.invalid"},
    {"MASTER_ADDR": "a" * 300},
    {"MASTER_ADDR": "a..b"},
]  # fmt: skip


@pytest.mark.parametrize("changes", WRONG, ids=lambda value: "_".join(f"{k}={v}"[:30] for k, v in value.items()))
def test_variables_of_a_launcher_are_checked(monkeypatch: pytest.MonkeyPatch, changes: dict[str, str | None]):
    (name,) = changes
    for key, value in {**LAUNCHED, **changes}.items():
        monkeypatch.delenv(key, raising=False) if value is None else monkeypatch.setenv(key, value)
    start = time.monotonic()
    with pytest.raises(ConfigError, match=name):
        check_launch(seconds=0.5)
    assert time.monotonic() - start < 5


def test_a_launcher_that_is_right_and_none_at_all(monkeypatch: pytest.MonkeyPatch):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    assert check_launch().world_size == 1
    monkeypatch.setenv("WORLD_SIZE", "64")
    assert check_launch(alone=True).world_size == 64
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    assert (check_launch().world_size, check_launch().rank) == (2, 0)


def test_train_ends_with_a_line_and_leaves_nothing(tmp_path: Path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(small_values(tmp_path)))
    before = sorted(tmp_path.rglob("*"))
    for override, environment, said in (
        ("run.dir=run", {"LOCAL_RANK": "x"}, "error: LOCAL_RANK = 'x' is not a number"),
        (f"data.tokenizer={tmp_path}", {}, "needs a tokenizer.json"),
    ):
        command = [sys.executable, str(ROOT / "train.py"), str(tmp_path / "c.yaml"), override]
        done = subprocess.run(
            command, env={**os.environ, **environment}, cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_wandb_online_needs_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    online = LoggingConfig(wandb="online")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for text in (None, "", "machine other.host login user password secret\n", "nonsense {"):
        if text is not None:
            (tmp_path / "netrc").write_text(text)
        with pytest.raises(ValueError, match="logging.wandb = online, but there is no API key: run `wandb login`"):
            check_trackers(online)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    check_trackers(online)
    monkeypatch.delenv("NETRC")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    check_trackers(online)
