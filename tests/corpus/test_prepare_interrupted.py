"""Runs of `prepare` that are killed, that fail, and that meet."""

from __future__ import annotations

import fcntl
import gzip
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from prepare_examples import changed, data_bytes, stdlib_recipe

from moba_megatron.corpus import prepare as prepare_module
from moba_megatron.corpus.documents import CorpusError
from moba_megatron.corpus.finish import _read_stats
from moba_megatron.corpus.manifest import load_manifest
from moba_megatron.corpus.prepare import prepare
from moba_megatron.corpus.prepare_plan import plan_preparation
from moba_megatron.corpus.recipe import Recipe
from moba_megatron.corpus.shards import MAX_LISTED, ShardStats, SkippedRow
from moba_megatron.corpus.tokenizer import Tokenizer
from moba_megatron.corpus.workspace import open_workspace

_RUN = """
import sys
from pathlib import Path
from moba_megatron.corpus.prepare import prepare
from moba_megatron.corpus.recipe import Recipe
if __name__ == "__main__":
    prepare(Recipe.model_validate_json(sys.argv[1]), Path(sys.argv[2]), workers=2)
"""


def test_a_killed_run_is_continued_to_the_same_bytes(tmp_path: Path):
    """Killed while training the tokenizer, after the first shard, while merging and while looking for duplicates."""
    recipe = stdlib_recipe({"kind": "bpe", "vocab_size": 512, "engine": "tokenizers"})
    recipe = changed(recipe, filters={"exact_duplicates": "drop"})
    out, work = tmp_path / "killed", tmp_path / "killed.partial"
    script = tmp_path / "run.py"
    script.write_text(_RUN)
    command = [sys.executable, str(script), recipe.model_dump_json(), str(out)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    late = ("dataset", "duplicates")
    for moment in ("plan.json", "shards/000000", *late):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        while not (work / moment).exists() and process.poll() is None:
            time.sleep(0.002)
        # Only the last moments are so short that a busy machine may miss them.
        assert process.poll() is None or moment in late, f"ended before {moment}"
        workers = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGKILL)
        process.wait()
        # Orphans would go on writing beside the next run.
        assert not psutil.wait_procs(workers, timeout=10)[1]
        assert not out.exists() or moment in late
    prepare(recipe, out, workers=1)
    assert not work.exists()
    prepare(recipe, tmp_path / "whole", workers=1)
    assert data_bytes(out) == data_bytes(tmp_path / "whole")


def test_finished_shards_are_kept(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe, done = stdlib_recipe({"kind": "pretrained", "path": str(tokenizer.folder)}), []
    original = prepare_module.encode_part

    def stop_at_third(job, number, part):
        if number == 2:
            raise KeyboardInterrupt
        return original(job, number, part)

    monkeypatch.setattr(prepare_module, "encode_part", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        prepare(recipe, tmp_path / "out", workers=1)
    monkeypatch.setattr(prepare_module, "encode_part", lambda *args: done.append(args[1]) or original(*args))
    prepare(recipe, tmp_path / "out", workers=1)
    assert done == list(range(2, len(plan_preparation(recipe).parts)))


def test_errors_of_the_disk_keep_the_work_and_those_of_the_recipe_do_not(recipe: Recipe, tmp_path: Path):
    for name in "abd":
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(b'{"text": "some text"}\n'))
    (tmp_path / "c.jsonl.gz").symlink_to("/proc/self/mem")
    own = changed(recipe, sources=[{"kind": "jsonl", "path": str(tmp_path / "*.gz")}], split={"validation": 0.0})
    with pytest.raises(OSError, match="Input/output error"):
        prepare(own, tmp_path / "out", workers=1)
    assert sorted(path.name for path in (tmp_path / "out.partial/shards").iterdir()) == ["000000", "000001"]
    (tmp_path / "c.jsonl.gz").unlink()
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "some text"}\n')[:-9])
    with pytest.raises(CorpusError, match="c.jsonl.gz cannot be read to its end"):
        prepare(own, tmp_path / "out", workers=1, overwrite=True)
    assert not (tmp_path / "out.partial").exists()


def test_skipped_rows_are_trimmed_while_the_shards_are_read(tmp_path: Path):
    rows = [SkippedRow(number=number, reason="empty") for number in range(MAX_LISTED)]
    for name, count in (("0", 400), ("1", MAX_LISTED), ("2", MAX_LISTED)):
        own = ShardStats(engine="x", splits={}, hash="", filtered=0, skipped=rows[:count], skipped_total=count)
        (tmp_path / name).mkdir()
        (tmp_path / name / "stats.json").write_text(own.model_dump_json())
    stats = _read_stats([tmp_path / name for name in "012"])
    assert [len(stat.skipped) for stat in stats] == [400, 600, 0]
    assert [stat.skipped_total for stat in stats] == [400, MAX_LISTED, MAX_LISTED]


def test_a_damaged_shard_is_made_again_and_no_other(recipe: Recipe, tmp_path: Path, monkeypatch):
    recipe, done = stdlib_recipe(recipe.tokenizer.model_dump()), []
    original = prepare_module.encode_part

    def damage(plan, tokenizer, space):
        stats = [space.shards / name / "stats.json" for name in ("000000", "000002")]
        stats[0].write_bytes(b"")
        stats[1].unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_module, "merge_shards", damage)
        prepare(recipe, tmp_path / "out", workers=1)
    monkeypatch.setattr(prepare_module, "encode_part", lambda *args: done.append(args[1]) or original(*args))
    prepare(recipe, tmp_path / "out", workers=1)
    assert done == [0, 2]
    prepare(recipe, tmp_path / "whole", workers=1)
    assert data_bytes(tmp_path / "out") == data_bytes(tmp_path / "whole")


def test_a_dataset_that_another_run_publishes_meanwhile_stays(recipe: Recipe, tmp_path: Path, monkeypatch):
    out, original, published = tmp_path / "out", prepare_module.open_workspace, []

    def open_late(*args):
        # Between this run's first look at the output and its lock, another run does all the work.
        monkeypatch.setattr(prepare_module, "open_workspace", original)
        published.append(prepare(recipe, out, workers=1))
        return original(*args)

    monkeypatch.setattr(prepare_module, "open_workspace", open_late)
    assert prepare(recipe, out, workers=1) == published[0] == load_manifest(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    shutil.rmtree(out)
    monkeypatch.setattr(prepare_module, "open_workspace", open_late)
    with pytest.raises(ValueError, match="holds another dataset"):
        prepare(changed(recipe, split={"validation": 0.4}), out, workers=1)
    assert load_manifest(out) == published[1]


def test_work_in_use_is_left_to_its_user(recipe: Recipe, tmp_path: Path):
    out, identity = tmp_path / "out", plan_preparation(recipe).identity
    prepare(recipe, out, workers=1)
    with open_workspace(out, identity, False) as space:
        prepare(recipe, out, workers=1)
        assert (space.folder / "plan.json").is_file()
        with pytest.raises(ValueError, match="another process is preparing"):
            prepare(changed(recipe, split={"validation": 0.4}), out, workers=1, overwrite=True)
    # Nobody's any more: what a run leaves that is killed after publishing.
    prepare(recipe, out, workers=1)
    assert not space.folder.exists()


def test_a_lock_that_was_removed_with_its_folder_locks_nothing(recipe: Recipe, tmp_path: Path, monkeypatch):
    out, identity, original = tmp_path / "out", plan_preparation(recipe).identity, fcntl.flock

    def lock_late(file, how):
        monkeypatch.setattr(fcntl, "flock", original)
        shutil.rmtree(tmp_path / "out.partial")
        original(file, how)

    monkeypatch.setattr(fcntl, "flock", lock_late)
    with pytest.raises(ValueError, match="another process is preparing"), open_workspace(out, identity, False):
        pass


def test_a_full_disk_ends_a_run_that_goes_on_when_there_is_room(tokenizer: Tokenizer, tmp_path: Path):
    """Files of the process may not grow over a limit, which the system reports as it does a full disk."""
    recipe = stdlib_recipe({"kind": "pretrained", "path": str(tokenizer.folder)})
    prepare(recipe, tmp_path / "whole", workers=1)
    largest = (tmp_path / "whole/train.bin").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # First a shard does not fit, then only what they are joined to.
    for limit, shards in ((100_000, 0), (largest - 1, len(plan_preparation(recipe).parts))):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            with pytest.raises(OSError, match=r"File too large: '.*out.partial/.*train.bin'"):
                prepare(recipe, tmp_path / "out", workers=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert len(list((tmp_path / "out.partial/shards").glob("*"))) == shards
        assert not (tmp_path / "out").exists()
    prepare(recipe, tmp_path / "out", workers=1)
    assert data_bytes(tmp_path / "out") == data_bytes(tmp_path / "whole")
