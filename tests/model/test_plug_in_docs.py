"""The example in docs/plug_in.md runs as it is printed: the set-up block first, then the others in order."""

import re
from pathlib import Path

from distributed import run_ranks

DOCUMENT = Path(__file__).parents[2] / "docs" / "plug_in.md"


def test_the_example_runs(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    # Not every megatron-core has hybrid models: tests/other_scripts/test_mixed_layers.py has that one.
    blocks = re.findall(r"```python( setup)?\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    assert [bool(setup) for setup, _ in blocks].count(True) == 1
    ordered = sorted(blocks, key=lambda block: not block[0])

    def run():
        names = {}
        for _, code in ordered:
            exec(compile(code, str(DOCUMENT), "exec"), names)
        first, packed = names["loss"][:1], names["packed_loss"]
        return first.shape, (first - packed)[:, :100].abs().max().item(), (first - packed)[:, 101:].abs().max().item()

    shape, same, different = run_ranks(1, run, prepare=False)[0]
    assert shape == (1, 256)
    assert same < 1e-4 < different


def test_the_swap_takes_ten_lines():
    code = re.search(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL).group(1)
    assert len(code.strip().splitlines()) <= 12
