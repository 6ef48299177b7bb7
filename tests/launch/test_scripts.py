"""The launch scripts without a cluster: they parse, are short, refuse mistakes; the manifest fits its schema."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml
from small_run import small_config

from moba_megatron.config import load_config

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
ENVIRONMENT = LAUNCH / "environment.sh"
SCRIPTS = sorted(path for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch") and path != ENVIRONMENT)
MANIFEST = yaml.safe_load((LAUNCH / "pytorchjob.yaml").read_text())
SCHEMA = json.loads(Path(__file__).with_name("pytorchjob_schema.json").read_text())


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_parses_stops_at_errors_and_is_short(path):
    text = path.read_text()
    checked = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert text.startswith("#!/usr/bin/env bash\n#") and "set -euo pipefail" in text
    assert len(text.splitlines()) < 60
    assert path.suffix == ".sbatch" or os.access(path, os.X_OK)
    named = re.findall(r"\bconfigs/[\w./]+\.yaml", text)
    assert all((ROOT / name).is_file() for name in named)


def test_scripts_use_their_arguments_as_given():
    """Every expansion of arguments is quoted: overrides hold brackets and blanks."""
    for path in (*SCRIPTS, LAUNCH / "pytorchjob.yaml"):
        unquoted = re.findall(r'(?<!["\w])\$@', path.read_text())
        assert not unquoted, path


STARTS = {
    "local.sh": ["2", "x.yaml"],
    "multi_node.sh": ["2", "0", "127.0.0.1", "2", "x.yaml"],
    "sweep.sbatch": ["x.yaml"],
}


@pytest.mark.parametrize("script", STARTS)
def test_every_process_gets_the_environment_of_a_training(tmp_path, script):
    """Seen by what the scripts start; what is set outside stays."""
    for name in ("torchrun", "moba-megatron", "scontrol"):
        command = tmp_path / "venv/bin" / name
        command.parent.mkdir(parents=True, exist_ok=True)
        command.write_text(f"#!/bin/sh\n[ {name} = scontrol ] || env > {tmp_path}/seen\n")
        command.chmod(0o755)
    given = {
        "PATH": f"{tmp_path}/venv/bin:{os.environ['PATH']}", "VENV": str(tmp_path / "venv"), "TMPDIR": str(tmp_path),
        "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "0", "INTERFACE": "lo",
    }  # fmt: skip
    expected = {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "TRITON_CACHE_DIR": f"{tmp_path}/triton-{os.getuid()}",
    }
    for outside in ({}, dict.fromkeys(expected, "as given")):
        result = subprocess.run(
            ["bash", LAUNCH / script, *STARTS[script]], env=given | outside, capture_output=True, text=True, timeout=60
        )
        assert result.returncode == 0, result.stderr
        seen = dict(line.partition("=")[::2] for line in (tmp_path / "seen").read_text().splitlines())
        assert {name: seen.get(name) for name in expected} == expected | outside


@pytest.mark.parametrize(
    ("script", "arguments"),
    [("local.sh", ["2"]), ("multi_node.sh", ["2", "0", "127.0.0.1", "2"]), ("evaluate.sbatch", [])],
)
def test_evaluation_starts_the_same_way(tmp_path, script, arguments):
    """What torchrun is told to start, on this machine or by srun."""
    for name, code in (
        ("torchrun", f'printf "%s\\n" "$@" > {tmp_path}/told'),
        ("scontrol", "echo 127.0.0.1"),
        ("srun", 'shift; exec "$@"'),
    ):
        command = tmp_path / "venv/bin" / name
        command.parent.mkdir(parents=True, exist_ok=True)
        command.write_text(f"#!/bin/sh\n{code}\n")
        command.chmod(0o755)
    given = {
        "PATH": f"{tmp_path}/venv/bin:{os.environ['PATH']}", "VENV": str(tmp_path / "venv"), "INTERFACE": "lo",
        "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "a", "SLURM_NNODES": "2",
        "SLURM_NODEID": "0",
    }  # fmt: skip
    asked = ["runs/my run", "--parallel", "context=2"]
    words = [] if script == "evaluate.sbatch" else ["evaluate"]
    result = subprocess.run(
        ["bash", LAUNCH / script, *arguments, *words, *asked], env=given, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "told").read_text().splitlines()[-6:] == ["-m", "moba_megatron", "evaluate", *asked]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["local.sh"], "usage: launch/local.sh RANKS CONFIG.yaml"),
        (["multi_node.sh", "2", "0", "head"], "usage: launch/multi_node.sh NODES NODE HEAD RANKS CONFIG.yaml"),
        (["multi_node.sh", "2", "0", "no.such.host.invalid", "1", "x.yaml"], "HEAD = no.such.host.invalid has no IPv4"),
        (["continued_pretraining.sh", "llama3.1_8b"], "usage: launch/continued_pretraining.sh MODEL GPUS WEIGHTS"),
        (["continued_pretraining.sh", "llama3.1_8b", "128", "models/x"], "GPUS = 128"),
        (["continued_pretraining.sh", "gpt2", "64", "models/x"], "MODEL = gpt2"),
        (["continued_pretraining.sh", "qwen2.5_7b", "1024", "models/missing"], "WEIGHTS = models/missing"),
        (["finished.sh"], "usage: launch/finished.sh CONFIG.yaml"),
        (["finished.sh", "missing.yaml"], "missing.yaml"),
        (["pod.sh"], "usage: launch/pod.sh CONFIG.yaml"),
        (["gpu_day_one.sh", "docs"], "docs is there already: name another folder"),
        (["gpu_day_one.sh", "runs/no_such_folder"], "error: PyTorch sees no GPU"),
    ],
)
def test_mistakes_end_with_two_and_say_what_is_wrong(command, words):
    result = subprocess.run([LAUNCH / command[0], *command[1:]], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and words in result.stderr, result.stderr


@pytest.mark.parametrize(
    ("config", "words"),
    [(None, "it has no tokenizer.json"), ({"model_type": "gpt2"}, "error: the configuration cannot be used")],
)
def test_weights_that_no_stage_can_use_submit_nothing(tmp_path, config, words):
    (tmp_path / "config.json").write_text(json.dumps(config or {}))
    if config:
        (tmp_path / "tokenizer.json").touch()
    command = [LAUNCH / "continued_pretraining.sh", "llama3.1_8b", "64", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and words in result.stderr and "job" not in result.stdout


def test_a_run_is_finished_when_it_has_made_all_its_steps(tmp_path):
    config = small_config(tmp_path, training__steps=40)
    path, status = tmp_path / "config.yaml", Path(config.run.dir) / "status.json"
    path.write_text(config.to_yaml())
    status.parent.mkdir()

    def finished(*overrides: str) -> tuple[int, str]:
        result = subprocess.run([LAUNCH / "finished.sh", path, *overrides], capture_output=True, text=True, timeout=60)
        return result.returncode, result.stderr.removeprefix(config.run.dir).strip()

    assert finished() == (1, ": not started at step 0 of 40")
    status.write_text('{"state": "stopped", "step": 6, "signal": "SIGUSR1"}')
    assert finished() == (1, ": stopped at step 6 of 40")
    status.write_text('{"state": "failed", "step": null}')
    assert finished() == (1, ": failed at step None of 40")
    status.write_text('{"state": "finished", "step": 40}')
    assert finished() == (0, ": finished at step 40 of 40")
    assert finished("training.steps=50") == (1, ": finished at step 40 of 50")


def test_the_manifest_fits_the_operators_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(MANIFEST, SCHEMA, jsonschema.Draft202012Validator)
    assert len((LAUNCH / "pytorchjob.yaml").read_text().splitlines()) < 60
    replicas = MANIFEST["spec"]["pytorchReplicaSpecs"]
    assert replicas["Worker"]["template"] == replicas["Master"]["template"]
    pod = replicas["Master"]["template"]["spec"]
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    values = {variable["name"]: variable["value"] for variable in container["env"]}
    assert int(values["RANKS"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    (script,), (config,) = container["command"], container["args"]
    assert os.access(ROOT / script, os.X_OK) and load_config(ROOT / config).attention.kind == "moba"


def change(path: str, value: object) -> dict:
    """The manifest with one value replaced, or taken out if it is None."""
    changed = copy.deepcopy(MANIFEST)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    place = changed
    for part in parents:
        place = place[part]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return changed


POD = "spec/pytorchReplicaSpecs/Master/template/spec"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("apiVersion", "kubeflow.org/v2"),
        ("metadata/name", "MoBA"),
        ("spec/replicas", 2),
        ("spec/runPolicy/cleanPodPolicy", "Never"),
        ("spec/pytorchReplicaSpecs/Master", None),
        ("spec/pytorchReplicaSpecs/Master/replicas", 2),
        ("spec/pytorchReplicaSpecs/Worker/replicas", "2"),
        ("spec/pytorchReplicaSpecs/Worker/restartPolicy", "Sometimes"),
        (f"{POD}/containers/0/name", "main"),
        (f"{POD}/containers/0/env/0/value", 8),
        (f"{POD}/containers/0/command", "bash"),
        (f"{POD}/containers/0/resources/limits/nvidia.com~gpu", -1),
        (f"{POD}/containers/0/volumeMounts/0/mountPath", "data"),
        (f"{POD}/volumes/1/emptyDir/sizeLimit", "64 GB"),
    ],
)
def test_a_broken_manifest_does_not(path, value):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(change(path, value), SCHEMA, jsonschema.Draft202012Validator)


@pytest.mark.slow
def test_the_first_day_on_a_gpu_runs_through_on_a_cpu(tmp_path):
    done = subprocess.run(
        [LAUNCH / "gpu_day_one.sh", tmp_path / "day"], env=os.environ | {"DRY": "1"}, capture_output=True, text=True
    )
    page = (tmp_path / "day/page.txt").read_text()
    assert done.returncode == 0 and done.stdout == page, page
    parts = re.findall(r"^(\w+): holds, \d+ s$", page, re.MULTILINE)
    assert parts == ["machine", "tests", "operator", "exchanges", "corpus", "training", "resumed"]
