"""Several processes that each do a share, and the merge of what they made."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from prepare_examples import changed, data_bytes, stdlib_recipe

from moba_megatron.corpus import prepare as prepare_module
from moba_megatron.corpus import workspace
from moba_megatron.corpus.engines import EngineMismatch
from moba_megatron.corpus.manifest import load_manifest
from moba_megatron.corpus.prepare import merge_shares, prepare, prepare_share
from moba_megatron.corpus.prepare_plan import plan_preparation
from moba_megatron.corpus.recipe import Recipe
from moba_megatron.corpus.tokenizer import Tokenizer
from moba_megatron.corpus.workspace import open_workspace

_RUN = """
import sys
from pathlib import Path
from moba_megatron.corpus.prepare import prepare_share
from moba_megatron.corpus.recipe import Recipe
if __name__ == "__main__":
    prepare_share(Recipe.model_validate_json(sys.argv[1]), Path(sys.argv[2]), (int(sys.argv[3]), 3), workers=1)
"""


def test_shares_at_the_same_time_and_killed_make_the_bytes_of_one_run(tmp_path: Path):
    """Three processes start together; the one that trains the tokenizer is killed, then one that encodes."""
    recipe = stdlib_recipe({"kind": "bpe", "vocab_size": 512, "engine": "tokenizers"})
    out, work, script = tmp_path / "shares", tmp_path / "shares.partial", tmp_path / "run.py"
    script.write_text(_RUN)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}

    def start(share: int) -> subprocess.Popen:
        command = [sys.executable, str(script), recipe.model_dump_json(), str(out), str(share)]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    first = start(0)
    while not (work / "lock.common").exists() and first.poll() is None:
        time.sleep(0.002)
    first.send_signal(signal.SIGKILL)
    first.wait()
    running = {share: start(share) for share in range(3)}
    while not list(work.glob("shards/*")) and psutil.pid_exists(running[1].pid) and running[1].poll() is None:
        time.sleep(0.002)
    running[1].send_signal(signal.SIGKILL)
    running[1].wait()
    running[1] = start(1)
    for share, process in running.items():
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0 and f"share {share}/3" in errors, errors
    merge_shares(out)
    assert not work.exists()
    prepare(recipe, tmp_path / "whole", workers=1)
    assert data_bytes(out) == data_bytes(tmp_path / "whole")
    # Asked again, both ways of ending find it done.
    assert merge_shares(out) == prepare(recipe, out, workers=1) == load_manifest(out)


def test_a_merge_waits_for_every_share(tokenizer: Tokenizer, tmp_path: Path):
    recipe = stdlib_recipe({"kind": "pretrained", "path": str(tokenizer.folder)})
    parts, out = len(plan_preparation(recipe).parts), tmp_path / "out"
    with pytest.raises(ValueError, match="out.partial holds no unfinished work: prepare its shares first"):
        merge_shares(out)
    prepare_share(recipe, out, (0, 2), workers=1)
    with pytest.raises(ValueError, match=f"{parts // 2} of {parts} parts are not done, the first is part 1"):
        merge_shares(out)
    other = changed(recipe, split={"validation": 0.4})
    with pytest.raises(ValueError, match=r"unfinished work on another dataset \(recipe.split.validation\)"):
        prepare_share(other, out, (1, 2), workers=1)
    with pytest.raises(ValueError, match="number must be from 0 to 1"):
        prepare_share(recipe, out, (2, 2), workers=1)
    prepare_share(recipe, out, (1, 2), workers=1)
    merge_shares(out)
    prepare(recipe, tmp_path / "whole", workers=1)
    assert data_bytes(out) == data_bytes(tmp_path / "whole")


@pytest.mark.parametrize("left", [1, 2, 3])
def test_a_merge_killed_while_tidying_is_done(recipe: Recipe, tmp_path: Path, monkeypatch, left: int):
    """Killed when so many of the lock, the plan and the rest are left."""
    out, original = tmp_path / "out", workspace._empty
    prepare_share(recipe, out, (0, 1), workers=1)

    def killed(folder: Path) -> None:
        kept = {path: path.read_bytes() for path in (folder / "lock", folder / "plan.json")[:left]}
        shards = list(folder.glob("shards/*"))
        original(folder)
        for path, data in kept.items():
            path.write_bytes(data)
        if left == 3:
            shards[0].mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(workspace, "_empty", killed)
        merge_shares(out)
    assert merge_shares(out) == prepare(recipe, out, workers=1) == load_manifest(out)
    assert left == 1 or not (tmp_path / "out.partial").exists()


def test_tidying_removes_the_plan_last(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    removed, unlink = [], Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path: removed.append(path.name) or unlink(path))
    for name in ("a", "plan.json", "z"):
        (tmp_path / name).touch()
    workspace._empty(tmp_path)
    assert removed[-1] == "plan.json" and len(removed) == 3


def test_shares_and_whole_runs_keep_out_of_each_others_way(recipe: Recipe, tmp_path: Path, monkeypatch):
    out, identity = tmp_path / "out", plan_preparation(recipe).identity
    with open_workspace(out, identity, False, share=(0, 2)):
        with open_workspace(out, identity, False, share=(1, 2)):
            pass
        with pytest.raises(ValueError, match="another process prepares share 0/2"):
            prepare_share(recipe, out, (0, 2), workers=1)
        with pytest.raises(ValueError, match="other processes are preparing 2 shares in "):
            prepare_share(recipe, out, (0, 3), workers=1)
        with pytest.raises(ValueError, match="are preparing another dataset in "):
            prepare_share(changed(recipe, split={"validation": 0.4}), out, (1, 2), workers=1, overwrite=True)
        for attempt in (lambda: prepare(recipe, out, workers=1, overwrite=True), lambda: merge_shares(out)):
            with pytest.raises(ValueError, match="another process is preparing"):
                attempt()
    monkeypatch.setattr("moba_megatron.corpus.workspace._PATIENCE", 0.1)
    with (
        open_workspace(out, identity, False),
        pytest.raises(ValueError, match="another process is preparing"),
        open_workspace(out, identity, False, share=(0, 2)),
    ):
        pass
    # A whole run takes over what shares have done.
    prepare_share(recipe, out, (0, 2), workers=1)
    prepare(recipe, out, workers=1)
    assert load_manifest(out)


def test_an_engine_that_one_share_finds_wrong_is_wrong_for_all(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("gigatoken")
    recipe, out = stdlib_recipe({"kind": "pretrained", "path": str(tokenizer.folder)}), tmp_path / "out"
    prepare_share(recipe, out, (0, 2), workers=1)
    original = prepare_module.encode_part

    def differ(job, number, part):
        if job.engine == "gigatoken":
            raise EngineMismatch("gigatoken and tokenizers give different ids for 'x'")
        return original(job, number, part)

    monkeypatch.setattr(prepare_module, "encode_part", differ)
    prepare_share(recipe, out, (1, 2), workers=1)
    with pytest.raises(ValueError, match="parts are not done, the first is part 0"):
        merge_shares(out)
    prepare_share(recipe, out, (0, 2), workers=1)
    manifest = merge_shares(out)
    assert manifest.tokenizer.engine == "tokenizers" and "different ids" in manifest.tokenizer.engine_reason
    prepare(recipe, tmp_path / "whole", workers=1)
    assert data_bytes(out) == data_bytes(tmp_path / "whole")
