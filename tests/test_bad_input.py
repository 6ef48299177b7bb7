"""Bad input by one table: every case ends with code 2 and a message that names the key or the file, without a
traceback, and leaves nothing behind."""

from __future__ import annotations

import json
import lzma
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from moba_megatron.cli import app


@dataclass(frozen=True)
class Case:
    """A call of `moba-megatron` that must be refused.

    Attributes:
        arguments: of the command; `{x}` is the path of file x of the case.
        message: what must be said; `{x}` as in `arguments`.
        files: to be made first, by name: text, bytes, values for JSON and YAML, or None for a folder.
        environment: variables of the process.
    """

    name: str
    arguments: str
    message: str
    files: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


def content(name: str, value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode()
    return (yaml.safe_dump(value, sort_keys=False) if name.endswith(".yaml") else json.dumps(value)).encode()


def everything(folder: Path) -> dict[str, Any]:
    """All files below a folder with what they hold."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def refused(case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in case.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(exist_ok=True) if value is None else path.write_bytes(content(name, value))
    monkeypatch.chdir(folder)
    for name, text in case.environment.items():
        monkeypatch.setenv(name, text)
    before = everything(folder)
    arguments = [word.replace("{cwd}", str(folder)) for word in case.arguments.split("|")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, (result.exit_code, result.exception, result.output[-3000:])
    output = " ".join(result.output.split())
    assert case.message.replace("{cwd}", str(folder)) in output, output
    assert "Traceback" not in output and "error" in output.lower()
    assert everything(folder) == before


# Values that `plan` takes, so that a case changes one thing.
GOOD = {
    "run": {"dir": "run"},
    "model": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 512},
    "attention": {"block_size": 16},
    "data": {"train": "train", "tokenizer": "tokenizer", "sequence_length": 128},
    "training": {"steps": 10, "global_batch_size": 8},
    "optimizer": {"lr": 1e-3},
}
GOOD_TEXT = yaml.safe_dump(GOOD, sort_keys=False)


def setting(override: str, message: str | None = None) -> Case:
    """`plan` of the good configuration with one override; the message names the key unless said otherwise."""
    key = override.partition("=")[0]
    return Case(f"set {override[:70]}", f"plan|c.yaml|{override}", message or key, {"c.yaml": GOOD_TEXT})


SETTINGS = [
    *(setting(f"{key}=1000000000000000000") for key in (
        "training.steps", "training.global_batch_size", "training.micro_batch_size", "training.loss_chunk_size",
        "model.num_layers", "model.hidden_size", "model.num_attention_heads", "model.num_query_groups",
        "model.kv_channels", "model.ffn_hidden_size", "model.vocab_size", "model.max_position_embeddings",
        "run.threads", "run.seed", "attention.block_size", "attention.top_k", "attention.last_n_full",
        "attention.full_every_n", "data.sequence_length", "parallel.tensor", "parallel.pipeline", "parallel.context",
        "checkpoint.every", "checkpoint.keep", "evaluation.samples", "evaluation.position_buckets", "logging.every",
        "optimizer.warmup_steps",
    )),
    *(setting(f"{key}={value}") for key in ("optimizer.lr", "optimizer.weight_decay", "optimizer.clip_grad",
      "optimizer.adam_eps", "model.rotary_base", "model.layernorm_epsilon", "model.init_method_std")
      for value in (".inf", ".nan", "-.inf")),
    setting("training.steps=1e18"),
    setting("training.steps=" + "9" * 5000),
    setting("model.num_layers=1e9"),
    setting("run.threads=1e9"),
    setting("training.steps=ten"),
    setting("training.steps=-1"),
    setting("training.steps=0"),
    setting("training.steps=true"),
    setting("training.steps=[1]"),
    setting("training.steps={a: 1}"),
    setting("training=null"),
    setting("model=null"),
    setting("optimizer=null"),
    setting("attention=null"),
    setting("data=[1, 2]"),
    setting("run=text"),
    setting("run.dir=", "run.dir="),
    setting("run.dir=   ", "run.dir = ' ': an empty path"),
    setting("run={dir: ''}", "run.dir = '': an empty path"),
    setting("data.train=???"),
    setting('data.train=[{path: "???"}]', "data.train.0.path = ???"),
    setting("data.train=[]", "data.train"),
    setting("data={train: '', tokenizer: t, sequence_length: 8}", "data.train"),
    setting("run.dir=???"),
    setting("checkpoint.allow_changed=[typo]", "checkpoint.allow_changed: 'typo' is neither a key nor a section"),
    setting("checkpoint.allow_changed=[training.step]", "did you mean training.steps?"),
    setting("checkpoint.allow_changed=[steps]", "checkpoint.allow_changed"),
    setting("model.num_layer=3", "model.num_layer: unknown key; did you mean model.num_layers?"),
    setting("nothing.at.all=1", "nothing: unknown key"),
    setting("training.steps", "override 'training.steps' is not of the form"),
    setting("=5", "is not of the form"),
    setting("a..b=5", "is not of the form"),
    setting("training.steps=[", "training.steps="),
    setting("training.steps=" + "[" * 3000, "training.steps="),
    setting("attention.kind=sparse"),
    setting("attention.stages=[{until: .nan}]", "attention.stages.0.until"),
    setting("attention.layers={9: {kind: full}}", "attention.layers names layer 9"),
    setting("attention.full_layers=[1000000000000]", "attention.full_layers"),
    setting("model.rotary_short_factors=[.nan]", "model.rotary_short_factors.0"),
    setting("model.no_rope_freq=[1, 2]", "model.no_rope_freq"),
    setting("data.train=[{path: a, weight: .inf}]", "data.train"),
    setting("data.train.5.path=a", "data.train"),
    setting("logging.wandb=sometimes", "logging.wandb"),
    setting("logging.wandb_project=", "logging.wandb_project="),
    setting("logging.profile_steps=[5, 1]", "logging.profile_steps"),
    setting("parallel.pipeline_layers=[1]", "parallel.pipeline_layers"),
    setting("optimizer.lr=${optimizer.nothing}", "optimizer.nothing"),
    setting("model.init_from=nowhere", "model.init_from = nowhere"),
]  # fmt: skip


def configuration(name: str, text: Any, message: str, **more: Any) -> Case:
    return Case(f"file {name}", "plan|c.yaml", message, {"c.yaml": text, **more})


DEEP = "a: " + "[" * 1500 + "]" * 1500
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
CONFIGURATIONS = [
    Case("file missing", "plan|none.yaml", "none.yaml"),
    Case("file is a folder", "plan|some.yaml", "some.yaml", {"some.yaml": None}),
    Case("file name too long", f"plan|{'x' * 300}.yaml", "a name that is too long"),
    configuration("empty", "", "run: missing"),
    configuration("list", "- a\n- b\n", "c.yaml must hold a mapping"),
    configuration("scalar", "text", "c.yaml must hold a mapping"),
    configuration("deep", DEEP, "c.yaml is nested too deep"),
    configuration("aliases without end", BOMB, "c.yaml stands for"),
    configuration("alias of itself", "a: &a [*a]\n", "c.yaml"),
    configuration("latin-1", "run: {dir: caf\xe9}".encode("latin-1"), "c.yaml is not UTF-8"),
    configuration("utf-16", GOOD_TEXT.encode("utf-16"), "c.yaml is not UTF-8"),
    configuration("zeros", b"\0" * 200, "c.yaml"),
    configuration("binary", bytes(range(256)), "c.yaml"),
    configuration("tab", "run:\n\tdir: x\n", "c.yaml is not valid YAML"),
    configuration("cut", GOOD_TEXT[:-3] + ": [", "c.yaml"),
    configuration("key twice", GOOD_TEXT + "run: {dir: y}\n", "c.yaml"),
    configuration("python object", "run: !!python/object/apply:os.system [ls]\n", "c.yaml"),
    configuration("unknown tag", "run: !thing {dir: x}\n", "c.yaml"),
    configuration("integer of 5000 digits", GOOD_TEXT.replace("steps: 10", "steps: " + "9" * 5000), "c.yaml"),
    configuration("reference to nothing", GOOD_TEXT.replace("dir: run", "dir: ${nowhere}"), "nowhere"),
    configuration("reference to itself", GOOD_TEXT.replace("dir: run", "dir: ${run.dir}"), "run.dir"),
    configuration("sections null", "".join(f"{name}:\n" for name in GOOD), "run = None"),
    *(configuration(f"null {name}", {**GOOD, name: None}, f"{name} = None") for name in GOOD),
    configuration("key is a number", {**GOOD, 5: 1}, "5 = 5: keys should be strings"),
    configuration("base missing", "base: none.yaml\n", "none.yaml"),
    configuration("base itself", "base: c.yaml\n", "includes itself"),
    configuration("base a number", "base: 5\n", "base = 5"),
    configuration("base a folder", "base: some\n", "{cwd}/some", some=None),
    configuration("base damaged", "base: b.yaml\n", "b.yaml is not valid YAML", **{"b.yaml": "a: ["}),
    configuration("base with a zero", 'base: "a\\0b"\n', "c.yaml: base ="),
    configuration("path with a zero", GOOD_TEXT.replace("dir: run", 'dir: "a\\0b"'), "run.dir"),
    configuration("date", GOOD_TEXT.replace("steps: 10", "steps: 2024-01-01"), "training.steps"),
]

HUGGING = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
}


def hugging(key: str, value: Any, message: str | None = None) -> Case:
    changed = {name: item for name, item in {**HUGGING, key: value}.items() if item is not ...}
    return Case(f"hf {key}={str(value)[:60]}", "plan|hf|--length|4K", message or key, {"hf/config.json": changed})


HUGGING_FACE = [
    *(hugging(key, value) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
      for value in ("64", -1, 0, 1.5, True, [64], {"a": 1}, 10**18, ...)),
    hugging("intermediate_size", "big"),
    hugging("num_key_value_heads", "4"),
    hugging("num_key_value_heads", 3, "model.num_query_groups = 3"),
    hugging("head_dim", "16"),
    hugging("max_position_embeddings", "2048"),
    hugging("rms_norm_eps", "1e-5"),
    hugging("rms_norm_eps", float("nan")),
    hugging("rms_norm_eps", -1.0),
    hugging("initializer_range", float("inf")),
    hugging("rope_theta", "10000"),
    hugging("rope_theta", float("inf")),
    hugging("tie_word_embeddings", "false"),
    hugging("tie_word_embeddings", 1),
    hugging("attention_bias", "no"),
    hugging("hidden_act", 5),
    hugging("architectures", "LlamaForCausalLM"),
    hugging("architectures", [5]),
    hugging("model_type", ["llama"]),
    hugging("model_type", "gpt2"),
    hugging("model_type", None),
    hugging("rope_scaling", "linear"),
    hugging("rope_scaling", [1]),
    hugging("rope_scaling", {"rope_type": "linear", "factor": "2"}, "rope_scaling.factor"),
    hugging("rope_scaling", {"rope_type": "linear", "factor": 0}, "rope_scaling.factor"),
    hugging("rope_scaling", {"rope_type": 5}, "rope_scaling.rope_type"),
    hugging("rope_scaling", {"rope_type": "longrope", "short_factor": "x", "long_factor": [1]}, "short_factor"),
    hugging("rope_parameters", {"rope_type": "llama3"}, "without"),
    hugging("layer_types", "full_attention"),
    hugging("auto_map", ["x"]),
    hugging("quantization_config", "int8"),
    hugging("moba_config", 5),
    *(Case(f"hf config.json {name}", "plan|hf|--length|4K", "config.json", {"hf/config.json": data})
      for name, data in {"empty": "", "list": "[]", "text": '"x"', "cut": '{"model_type": "llama"', "deep": "[" * 99999,
                         "latin": b'{"a": "\xe9"}', "zeros": b"\0" * 64}.items()),
]  # fmt: skip

RECIPE = {
    "sources": [{"kind": "jsonl", "path": "rows.jsonl"}],
    "tokenizer": {"kind": "bpe", "vocab_size": 300},
}
ROWS = '{"text": "some words of a text"}\n' * 50


def recipe(name: str, changed: Any, message: str, **files: Any) -> Case:
    values = {**RECIPE, **changed} if isinstance(changed, dict) else changed
    return Case(f"recipe {name}", "prepare|r.yaml|out", message, {"r.yaml": values, "rows.jsonl": ROWS, **files})


def inputs(name: str, data: Any, message: str, file: str = "rows.jsonl", *more: str) -> Case:
    words = ["prepare", "out", "--input", file, "--train-tokenizer", "300", "--workers", "1", *more]
    return Case(f"input {name}", "|".join(words), message, {file: data})


TOKENIZER = (Path(__file__).parent / "assets/tokens/tokenizer/tokenizer.json").read_text()


def tokenizer(name: str, files: dict[str, Any], message: str) -> Case:
    made = {f"tok/{file}": data for file, data in files.items()}
    words = "prepare|out|--input|rows.jsonl|--tokenizer|tok|--workers|1"
    return Case(f"tokenizer {name}", words, message, {"rows.jsonl": ROWS, **made})


CORPUS = [
    recipe("sources empty", {"sources": []}, "sources"),
    recipe("sources null", {"sources": None}, "sources"),
    recipe("kind unknown", {"sources": [{"kind": "pdf", "path": "a"}]}, "sources.0"),
    recipe("path empty", {"sources": [{"kind": "jsonl", "path": ""}]}, "path"),
    recipe("path open", {"sources": [{"kind": "jsonl", "path": "???"}]}, "sources.0.path = ???"),
    recipe("path nowhere", {"sources": [{"kind": "jsonl", "path": "none.jsonl"}]}, "none.jsonl"),
    recipe("vocabulary huge", {"tokenizer": {"kind": "bpe", "vocab_size": 10**18}}, "vocab_size"),
    recipe("validation nan", {"split": {"validation": float("nan")}}, "split.validation"),
    recipe("validation two", {"split": {"validation": 2}}, "split.validation"),
    recipe("filters negative", {"filters": {"min_characters": -1}}, "filters.min_characters"),
    recipe("filters beyond a word", {"filters": {"max_row_bytes": 10**30}}, "filters.max_row_bytes"),
    recipe("unknown key", {"sauces": []}, "sauces: unknown key"),
    recipe("list", ["a"], "r.yaml must hold a mapping"),
    recipe("deep", DEEP, "r.yaml is nested too deep"),
    recipe("latin-1", "a: \xe9".encode("latin-1"), "r.yaml is not UTF-8"),
    Case("recipe is a folder", "prepare|some|out", "no such recipe: some", {"some": None}),
    Case("recipe missing", "prepare|none.yaml|out", "no such recipe: none.yaml"),
    Case("output is a file", "prepare|r.yaml|out", "out", {"r.yaml": RECIPE, "rows.jsonl": ROWS, "out": "x"}),
    Case("output below a file", "prepare|r.yaml|file/out", "file", {"r.yaml": RECIPE, "rows.jsonl": ROWS, "file": "x"}),
    Case("share is none", "prepare|r.yaml|out|--shard|5/2", "--shard 5/2", {"r.yaml": RECIPE}),
    Case("workers without end", "prepare|r.yaml|out|--workers|1000000000", "'--workers'", {"r.yaml": RECIPE}),
    inputs("empty", "", "no documents"),
    inputs("every line cut", '{"text": "some\n' * 20, "tokenizer.vocab_size = 300: give more text"),
    inputs("one list", '[{"text": "a"}]', "rows.jsonl is one JSON list"),
    inputs("no column", '{"body": "a"}\n' * 20, "rows.jsonl"),
    inputs("gzip cut", b"\x1f\x8b\x08\0\0\0\0\0", "rows.jsonl.gz", "rows.jsonl.gz"),
    inputs("gzip is none", b"plain text", "rows.jsonl.gz", "rows.jsonl.gz"),
    inputs("zstd is none", b"plain text", "rows.jsonl.zst", "rows.jsonl.zst"),
    inputs("xz cut", lzma.compress(ROWS.encode())[:-20], "rows.jsonl.xz", "rows.jsonl.xz"),
    inputs("parquet is none", b"plain text", "rows.parquet", "rows.parquet"),
    inputs("parquet cut", b"PAR1" + b"\0" * 40, "rows.parquet", "rows.parquet"),
    inputs("arrow is none", b"plain text", "rows.arrow", "rows.arrow"),
    inputs("too little text", '{"text": "a"}\n', "tokenizer.vocab_size"),
    tokenizer("missing", {"other.txt": "x"}, "no tokenizer in tok"),
    tokenizer("empty", {"tokenizer.json": ""}, "tok/tokenizer.json is damaged"),
    tokenizer("cut", {"tokenizer.json": TOKENIZER[: len(TOKENIZER) // 2]}, "tok/tokenizer.json is damaged"),
    tokenizer("list", {"tokenizer.json": "[]"}, "tok/tokenizer.json is damaged"),
    tokenizer("binary", {"tokenizer.json": bytes(range(256))}, "tok/tokenizer.json is damaged"),
    tokenizer("deep", {"tokenizer.json": "[" * 99999}, "tok/tokenizer.json is damaged"),
    tokenizer("folder", {"tokenizer.json": None}, "no tokenizer in tok"),
    tokenizer("configuration list", {"tokenizer.json": TOKENIZER, "tokenizer_config.json": "[]"}, "tokenizer_config"),
    tokenizer("configuration cut", {"tokenizer.json": TOKENIZER, "tokenizer_config.json": "{"}, "tokenizer_config"),
    tokenizer(
        "configuration latin-1", {"tokenizer.json": TOKENIZER, "tokenizer_config.json": b'{"a": "\xe9"}'}, "tokenizer_c"
    ),
    Case("inspect nothing", "prepare|inspect|none", "none is not a prepared dataset"),
    Case("inspect a file", "prepare|inspect|file", "file", {"file": "x"}),
    *(Case(f"manifest {name}", "prepare|inspect|set", "set/manifest.json", {"set/manifest.json": data})
      for name, data in {"empty": "", "object": "{}", "list": "[]", "cut": '{"format": 1', "deep": "[" * 99999,
                         "latin": b'{"a": "\xe9"}'}.items()),
    Case("blend of nothing", "prepare|blend|b.yaml|out", "sources", {"b.yaml": {"sources": []}}),
    Case("blend missing", "prepare|blend|none.yaml|out", "none.yaml"),
    Case("blend of a lost set", "prepare|blend|b.yaml|out", "lost/train",
         {"b.yaml": {"sources": [{"path": "lost/train"}]}}),
    Case("blend weight nan", "prepare|blend|b.yaml|out", "weight",
         {"b.yaml": {"sources": [{"path": "a", "weight": float("nan")}]}}),
    Case("merge of nothing", "prepare|merge|none", "none"),
]  # fmt: skip

SWEEP = {"base": "c.yaml", "dir": "runs", "axes": {"size": {"a": {"model.num_layers": 2}}}}


def sweep(name: str, changed: Any, message: str) -> Case:
    values = {**SWEEP, **changed} if isinstance(changed, dict) else changed
    return Case(f"sweep {name}", "scaling|plan|s.yaml", message, {"s.yaml": values, "c.yaml": GOOD_TEXT})


SWEEPS = [
    Case("sweep missing", "scaling|plan|none.yaml", "none.yaml"),
    sweep("empty", "", "s.yaml"),
    sweep("list", ["a"], "s.yaml"),
    sweep("deep", DEEP, "s.yaml is nested too deep"),
    sweep("latin-1", "a: \xe9".encode("latin-1"), "s.yaml is not UTF-8"),
    sweep("base missing", {"base": "none.yaml"}, "none.yaml"),
    sweep("base open", {"base": "???"}, "base = ???"),
    sweep("dir empty", {"dir": ""}, "dir"),
    sweep("axes null", {"axes": None}, "axes"),
    sweep("axes empty", {"axes": {}}, "axes"),
    sweep("option wrong", {"axes": {"size": {"a": {"model.num_layers": -1}}}}, "model.num_layers"),
    sweep("option unknown", {"axes": {"size": {"a": {"model.layers": 1}}}}, "model.layers"),
    sweep("tokens infinite", {"tokens": float("inf")}, "tokens"),
    sweep("tokens nan", {"tokens_per_parameter": float("nan")}, "tokens_per_parameter"),
    sweep(
        "runs without end",
        {"axes": {f"a{n}": {f"o{m}": {} for m in range(10)} for n in range(12)}},
        "axes: their options",
    ),
    sweep("tokens beyond all", {"tokens": 1e300}, "training.steps"),
    sweep("two names", {"axes": {"a": {"x": {}, "x ": {}}}}, "x"),
]


LINE = '{"step": 1, "loss": 2.0, "tokens": 5}\n'


def run_folder(name: str, command: str, files: dict[str, Any], message: str) -> Case:
    return Case(f"run {name}", command, message, {f"run/{file}": data for file, data in files.items()})


RUNS = [
    *(Case(f"{command} of nothing", f"{command}|none{more}", "none")
      for command, more in (("evaluate", ""), ("generate", "|--prompt|x"), ("export-hf", "|out"), ("report", ""),
                            ("import-hf", "|out"))),
    *(Case(f"{command} of a file", f"{command}|file{more}", "file", {"file": "x"})
      for command, more in (("evaluate", ""), ("generate", "|--prompt|x"), ("export-hf", "|out"), ("report", ""),
                            ("import-hf", "|out"))),
    Case("generate prompt file missing", "generate|none|--prompt-file|p.txt", "p.txt"),
    Case("generate prompt file is a folder", "generate|none|--prompt-file|some", "some", {"some": None}),
    Case("generate prompt file latin-1", "generate|none|--prompt-file|p.txt", "p.txt", {"p.txt": b"caf\xe9"}),
    Case("generate two prompts", "generate|none|--prompt|x|--prompt-file|p", "--prompt"),
    Case("generate tokens negative", "generate|none|--prompt|x|--tokens|-5", "--tokens"),
    Case("evaluate lengths", "evaluate|none|--lengths|4K", "--lengths 4K"),
    Case("evaluate haystack", "evaluate|none|--haystack|x", "--haystack x"),
    Case("evaluate choice", "evaluate|none|--routing-choice|5", "--routing-choice"),
    Case("evaluate depths", "evaluate|none|--tasks|needle|--depths|x", "depths"),
    Case("evaluate task", "evaluate|none|--tasks|nothing", "nothing"),
    run_folder("configuration cut", "evaluate|run", {"config.yaml": "run: ["}, "run"),
    run_folder("metrics cut within", "report|run", {"metrics.jsonl": LINE + '{"ste\n' + LINE},
               "metrics.jsonl, line 2"),
    run_folder("metrics without steps", "report|run", {"metrics.jsonl": LINE + '{"loss": 1}\n'},
               "line 2 is damaged: it has no step"),
    run_folder("status without state", "report|run", {"metrics.jsonl": LINE, "status.json": "[]"}, "run/status.json"),
    run_folder("metrics of numbers", "report|run", {"metrics.jsonl": "5\n"}, "metrics.jsonl, line 1"),
    run_folder("metrics binary", "report|run", {"metrics.jsonl": bytes(range(256)) + b"\n"}, "metrics.jsonl"),
    run_folder("metrics is a folder", "report|run", {"metrics.jsonl": None}, "run"),
    Case("plan gpu", "plan|c.yaml|--gpu|z80", "--gpu z80", {"c.yaml": GOOD_TEXT}),
    Case("plan length", "plan|c.yaml|--length|x", "--length", {"c.yaml": GOOD_TEXT}),
    Case("plan output is a folder", "plan|c.yaml|training.precision=bf16|--json|some", "some",
         {"c.yaml": GOOD_TEXT, "some": None}),
    Case("plan output below a file", "plan|c.yaml|--json|c.yaml/x", "c.yaml: exists already", {"c.yaml": GOOD_TEXT}),
    Case("bench lengths", "bench|--lengths|x", "--lengths"),
    Case("bench blocks", "bench|--blocks|x", "--blocks"),
    Case("no such command", "nothing", "nothing"),
    Case("no such option", "plan|c.yaml|--nothing", "--nothing", {"c.yaml": GOOD_TEXT}),
]  # fmt: skip
CASES = [*SETTINGS, *CONFIGURATIONS, *HUGGING_FACE, *CORPUS, *SWEEPS, *RUNS]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_refused(case, tmp_path, monkeypatch):
    refused(case, tmp_path, monkeypatch)


def test_the_table_is_long_enough_and_names_each_case_once():
    names = [case.name for case in CASES]
    assert len(names) >= 150 and len(set(names)) == len(names)
