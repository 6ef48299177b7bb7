"""An exported model in environments that have nothing of Megatron: made anew by pip, so this takes minutes and an index
of packages (`make test-slow`)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from distributed import run_ranks
from small_run import small_config, train_here

from moba_megatron.convert.export_hf import export_huggingface
from moba_megatron.convert.exported import open_exported
from moba_megatron.generation.engine import continue_prompt
from moba_megatron.generation.loading import load_generator

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TOKENS = 24
# Longer than block_size * top_k = 48 tokens, where MoBA is another attention than the full one.
PROMPT = " ".join(f"w{3 + 7 * i * i % 29}" for i in range(100))
GENERATE = """
import importlib.util, json, sys
folder, prompt, tokens, package = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "package"
if package:
    import moba_megatron.hf
from transformers import AutoModelForCausalLM, AutoTokenizer
loading = {"attn_implementation": "moba"} if package else {"trust_remote_code": True}
model = AutoModelForCausalLM.from_pretrained(folder, **loading).eval()
inputs = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt")
inputs.pop("token_type_ids", None)
length = inputs["input_ids"].shape[1]
new = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0, length:].tolist()
installed = [name for name in ("megatron", "moba_megatron") if importlib.util.find_spec(name)]
print(json.dumps({"prompt": length, "new": new, "installed": installed, "class": type(model).__name__}))
"""
LOAD_PLAINLY = """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1])
"""


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> Path:
    """A trained run, and its exports: `plain` and `own`, with its own code."""
    folder = tmp_path_factory.mktemp("trained")
    config = small_config(folder, training__steps=4, model__init_method_std=0.3)
    run_ranks(1, train_here, config)
    exported = open_exported(config.run.dir)
    export_huggingface(exported, folder / "plain")
    export_huggingface(exported, folder / "own", self_contained=True)
    return folder


def our_tokens(run: Path, attention: str = "moba") -> list[int]:
    generator = load_generator(run)
    generator.model.set_attn_implementation(attention)
    return list(continue_prompt(generator.model, generator.encode(PROMPT), max_new_tokens=TOKENS, temperature=0.0))


class Environment:
    """A virtual environment of its own."""

    def __init__(self, folder: Path, *requirements: str):
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        self.python("-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements)

    def python(self, *arguments: str | Path, fails: bool = False) -> str:
        """Run its Python, which knows nothing of this one's environment; what it printed."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_", "VIRTUAL_ENV"))}
        environment = {**kept, "HF_HOME": str(self.folder / "cache"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [self.folder / "venv/bin/python", *arguments],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert (done.returncode != 0) == fails, done.stderr[-3000:]
        return done.stderr if fails else done.stdout

    def generate(self, export: Path, form: str) -> dict:
        return json.loads(self.python("-c", GENERATE, export, PROMPT, str(TOKENS), form).splitlines()[-1])


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """The sources without this checkout around them: building leaves files beside them."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT / "moba_megatron", folder / "moba_megatron", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, folder / name)
    return folder


def test_transformers_alone_generates_our_text(exports, tmp_path):
    fresh = Environment(tmp_path, "--constraint", str(ROOT / "constraints.txt"), "torch", "transformers")
    expected = our_tokens(exports / "run")
    assert expected != our_tokens(exports / "run", "sdpa"), "full attention gives the same text: nothing is shown"
    found = fresh.generate(exports / "own", "own code")
    assert found == {"prompt": 100, "new": expected, "installed": [], "class": "MoBALlamaForCausalLM"}
    assert "moba" in fresh.python("-c", LOAD_PLAINLY, exports / "plain", fails=True)


def test_the_base_package_without_megatron_generates_our_text(exports, package, tmp_path):
    fresh = Environment(tmp_path, "--constraint", str(ROOT / "constraints.txt"), f"{package}[hf]")
    found = fresh.generate(exports / "plain", "package")
    expected = our_tokens(exports / "run")
    assert found == {"prompt": 100, "new": expected, "installed": ["moba_megatron"], "class": "LlamaForCausalLM"}


def test_the_older_transformers_generates_our_text_from_both(exports, package, tmp_path):
    fresh = Environment(tmp_path, str(package), "transformers==4.57.*")
    expected = our_tokens(exports / "run")
    for form, export in (("own code", "own"), ("package", "plain")):
        assert fresh.generate(exports / export, form)["new"] == expected, form
