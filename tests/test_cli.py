"""The installed command on a real run: evaluate, generate, doctor, and their errors."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from distributed import run_ranks
from small_run import small_config, train_here

from moba_megatron.platform.megatron_core import missing_capabilities
from moba_megatron.runs.files import read_json_lines
from moba_megatron.runs.folder import training_records

FULL = "attention.full_backend = auto: torch (auto: PyTorch's fused kernels; not available: flash_attn_3, flash_attn_4"
COMMAND = Path(sys.executable).with_name("moba-megatron")


def call(*arguments: object, code: int = 0) -> str:
    """Run the command and return what it prints, or what it complains of; fail unless it ends with this code."""
    result = subprocess.run([str(COMMAND), *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr if code else result.stdout


def test_the_package_is_the_command():
    command = [sys.executable, "-m", "moba_megatron", "plan", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    # The usage is padded to the width of the terminal.
    assert done.stdout.replace("python -m moba_megatron", "moba-megatron").split() == call("plan", "--help").split()


# What takes seconds to import.
HEAVY = ("torch", "megatron", "transformers", "numpy", "scipy", "matplotlib", "omegaconf", "tokenizers", "datasets")
ALL_HELP = """
import sys
from typer.testing import CliRunner
from moba_megatron.cli import COMMANDS, app
for words in ["", *COMMANDS, *(f"scaling {name}" for name in "plan run fit plot table".split()),
              *(f"checkpoint {name}" for name in "verify list inspect diff".split())]:
    result = CliRunner().invoke(app, [*words.split(), "--help"])
    assert result.exit_code == 0 and "Usage:" in result.output, (words, result.output)
print(*(name for name in sys.argv[1:] if name in sys.modules))
"""


def test_help_imports_nothing_that_takes_long():
    command = [sys.executable, "-c", ALL_HELP, *HEAVY]
    assert subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout == "\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = small_config(
        tmp_path_factory.mktemp("trained"),
        training__steps=6,
        checkpoint__every=3,
        evaluation__every=3,
        attention__stages=[{"until": 0.5}, {"until": 1.0, "kind": "full"}],
        logging__tensorboard=True,
        logging__wandb="offline",
        logging__profile_steps=[3, 4],
    )
    run_ranks(1, train_here, config)
    return Path(config.run.dir)


def test_evaluate_gives_the_loss_that_training_recorded(run):
    output = call("evaluate", run)
    assert "validation loss" in output and "trailing loss (last 8 positions)" in output and str(run) in output
    recorded = training_records(read_json_lines(run / "evaluations.jsonl"))[-1]
    found = json.loads((run / "evaluation/step_6.json").read_text())
    assert found["loss"] == pytest.approx(recorded["loss"], rel=1e-6)
    assert (run / "plots/loss_by_position_step_6.png").stat().st_size > 1000
    assert list((run / "wandb").glob("offline-run-*-evaluate")), "a run of its own beside the training's"


def test_a_checkpoint_attends_as_in_its_stage_and_a_moved_run_keeps_its_results(run, tmp_path):
    moved = shutil.copytree(run, tmp_path / "moved")
    call("evaluate", moved / "checkpoints/step_3")
    found = json.loads((moved / "evaluation/step_3.json").read_text())
    in_training, last = training_records(read_json_lines(run / "evaluations.jsonl"))
    assert (in_training["step"], last["step"]) == (3, 6)
    # Step 3 is the last of the sparse stage; with full attention its weights give another loss.
    assert found["loss"] == pytest.approx(in_training["loss"], rel=1e-6)


def test_evaluate_refuses_more_samples_than_there_are(run):
    assert "evaluation.samples" in call("evaluate", run, "--samples", 100000, code=2)


def test_generate_continues_the_prompt(run):
    first, second = (call("generate", run, "--prompt", "w5 w6", "--tokens", 5, "--seed", s) for s in (1, 1))
    assert first == second and first.startswith("w5w6")
    assert call("generate", run, "--prompt", "w5 w6", "--tokens", 5, "--temperature", 0).startswith("w5w6")


@pytest.mark.parametrize("command", [("evaluate",), ("generate", "--prompt", "x")])
def test_a_folder_without_a_run_is_refused(tmp_path, command):
    assert "neither a checkpoint nor a run folder" in call(*command, tmp_path, code=2)


def test_doctor_tells_what_a_configuration_would_use(run):
    output = call("doctor", run / "config.yaml")
    chosen = ("attention.backend = auto: gathered", FULL, "layers: local")
    weights = f"weights: from checkpoint {run}/checkpoints/step_"
    for expected in ("megatron-core", "transformer_engine", weights, *chosen):
        assert expected in output
    # What this release of megatron-core lacks is named.
    lacks = [capability.name for capability in missing_capabilities()]
    assert output.count("which lacks") == len(lacks) and all(name.split()[0] in output for name in lacks)


def test_doctor_names_the_megatron_core_that_is_imported(tmp_path):
    checkout = tmp_path / "megatron/core"
    checkout.mkdir(parents=True)
    (checkout / "__init__.py").write_text("__version__ = '0.42.1'\n")
    code = "from moba_megatron.platform.megatron_core import imported_elsewhere; print(imported_elsewhere())"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"0.42.1 from {tmp_path}"


def test_doctor_explains_a_megatron_core_that_does_not_import(tmp_path):
    """As with Transformer Engine's Python part alone: its library is looked for when megatron-core is imported."""
    checkout = tmp_path / "megatron/core"
    checkout.mkdir(parents=True)
    (checkout / "__init__.py").write_text("raise FileNotFoundError('Could not find shared object file: transformer')")
    code = (
        "from rich.console import Console; from moba_megatron.doctor import _print_versions; "
        "_print_versions(Console(width=400))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "FileNotFoundError: Could not find shared object file: transformer. Transformer Engine with" in done.stdout
    # Brackets are no markup.
    assert "'transformer-engine[pytorch]'" in done.stdout


def test_trackers_and_profiler_wrote_their_files(run):
    assert list((run / "tensorboard").glob("events.*"))
    assert list((run / "wandb").glob("offline-run-*/*.wandb"))
    trace = json.loads((run / "profile/rank_0_steps_3_4.json").read_text())
    assert any(str(event.get("name")).startswith("aten::") for event in trace["traceEvents"])


def test_help_lists_every_command():
    output = call("--help")
    for name in ("prepare", "evaluate", "generate", "bench", "doctor", "scaling"):
        # The name stands at the start of its line.
        assert re.search(rf"^\W*{name} ", output, re.MULTILINE), name
