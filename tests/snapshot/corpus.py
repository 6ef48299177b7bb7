"""The bytes that `moba-megatron prepare` makes of a corpus that is written here, and what it says about them."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import yaml

from snapshot.commands import elsewhere, run
from snapshot.texts import as_json, sha256, write_lines

WORDS = "alpha beta gamma def return import class self value tensor naïve 東京 für 12 345 +-= () \U0001f600".split()
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Of a manifest: what depends on the time, the machine or the libraries, and the names of what made it.
PASSING = ("created", "seconds", "workers", "versions", "command", "engine_reason")
SOURCES: dict[str, dict[str, Any]] = {
    "texts": {"kind": "files", "path": "texts"},
    "rows": {"kind": "jsonl", "path": "rows/*.jsonl", "text_column": "body"},
    "answers": {"kind": "jsonl", "path": "answers.jsonl", "prompt_column": "question", "answer_column": "reply"},
    "chats": {"kind": "jsonl", "path": "chats.jsonl", "messages_column": "messages"},
}


def take_data(out: Path) -> None:
    """Prepare each kind of source, with a tokenizer trained here, in shares as well, and blends of the datasets."""
    with elsewhere():
        write_corpus()
        bpe = {"kind": "bpe", "vocab_size": 320, "engine": "tokenizers"}
        _prepare(out, "texts", [SOURCES["texts"]], bpe)
        _prepare(out, "fast_engine", [SOURCES["texts"]], bpe | {"engine": "auto"})
        shutil.copytree("texts_data/tokenizer", "chat_tokenizer")
        Path("chat_tokenizer/chat_template.jinja").write_text(CHAT_TEMPLATE)
        trained, chat = ({"kind": "pretrained", "path": path} for path in ("texts_data/tokenizer", "chat_tokenizer"))
        _prepare(out, "rows", [SOURCES["rows"]], trained, filters={"min_tokens": 20, "exact_duplicates": "drop"})
        _prepare(out, "answers", [SOURCES["answers"]], trained)
        _prepare(out, "chats", [SOURCES["chats"]], chat)
        _prepare(out, "mixed", [SOURCES["texts"], SOURCES["rows"], SOURCES["answers"]], trained)
        _prepare(out, "in_shares", [SOURCES["texts"], SOURCES["rows"]], trained, shares=3)
        mix = {
            "sources": [{"path": "texts_data/train", "weight": 3.0}, {"path": "answers_data/train", "weight": 1.0}],
            "lengths": [{"at_least": 256, "upsample": 4.0}],
        }
        Path("mix.yaml").write_text(yaml.safe_dump(mix))
        said = [run("prepare", "blend", "mix.yaml", "blend_data"), run("prepare", "inspect", "blend_data")]
        write_lines(out, "data/blend.txt", [*said, *files_of(Path("blend_data"))])
        write_lines(out, "data/inputs.txt", map(inputs_of, sorted(Path().glob("*_data"))))


def write_corpus() -> None:
    """Texts of 100 to 6,000 characters, rows with duplicates among them, questions with answers, conversations."""
    draw = random.Random(20240229)

    def text(words: int) -> str:
        return " ".join(draw.choice(WORDS) + draw.choice(["", "", "", "\n", "\r\n", "  ", ","]) for _ in range(words))

    for number in range(120):
        path = Path(f"texts/part{number % 3}/{number:03d}.txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text(draw.choice([20, 60, 150, 400, 1000])).encode())
    Path("rows").mkdir()
    for part in range(2):
        rows = [{"body": text(draw.choice([3, 40, 200])), "number": number} for number in range(60)]
        _write_rows(f"rows/{part}.jsonl", [*rows, *rows[:5]])
    _write_rows("answers.jsonl", [{"question": text(12), "reply": text(draw.choice([5, 90]))} for _ in range(80)])
    roles = ("user", "assistant", "user", "assistant")
    chats = [[{"role": role, "content": text(15)} for role in roles[: draw.choice([2, 4])]] for _ in range(60)]
    _write_rows("chats.jsonl", [{"messages": messages} for messages in chats])
    # A dataset's identity knows when its inputs were last changed.
    for path in [*Path("texts").rglob("*.txt"), *Path("rows").iterdir(), *Path().glob("*.jsonl")]:
        os.utime(path, ns=(1_700_000_000_000_000_000,) * 2)


def inputs_of(folder: Path) -> str:
    """The hashes by which a dataset knows its inputs. They are made of the names in the code that lists these."""
    return f"{folder} {' '.join(json.loads((folder / 'manifest.json').read_text())['identity'].get('inputs', []))}"


def files_of(folder: Path) -> list[str]:
    """A line for each file of a dataset: a hash of its bytes; of a manifest, what stays, as JSON."""
    lines = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.name == "manifest.json":
            lines += [path.name, as_json(without_passing(json.loads(path.read_text())))]
        elif path.suffix == ".png":
            lines.append(f"{path.relative_to(folder)} is there")
        else:
            lines.append(f"{path.relative_to(folder)} {path.stat().st_size} {sha256(path)}")
    return lines


def without_passing(values: Any) -> Any:
    """A manifest without times, versions, and the hashes of `inputs_of`."""
    if isinstance(values, dict):
        kept = {key: value for key, value in values.items() if key not in PASSING}
        return {key: without_passing(value) for key, value in kept.items() if (key, type(value)) != ("inputs", list)}
    return [without_passing(value) for value in values] if isinstance(values, list) else values


def _prepare(out: Path, name: str, sources: list[dict], tokenizer: dict, shares: int = 0, **more: Any) -> None:
    recipe = {"sources": sources, "tokenizer": tokenizer, "split": {"validation": 0.2}} | more
    Path(f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    command, folder = ["prepare", f"{name}.yaml", f"{name}_data", "--workers", "1"], Path(f"{name}_data")
    if shares:
        said = [run(*command, "--shard", f"{number}/{shares}") for number in range(shares)]
        said.append(run("prepare", "merge", folder))
    else:
        said = [run(*command)]
    said += [run("prepare", "inspect", folder, *more) for more in ((), ("--check",))]
    write_lines(out, f"data/{name}.txt", [*said, *files_of(folder)])


def _write_rows(path: str, rows: list[dict]) -> None:
    Path(path).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
