"""What differs between two snapshots."""

from __future__ import annotations

import collections
import difflib
import re
from pathlib import Path


def compare(a: Path, b: Path, only: list[str] | None = None, limit: int = 40) -> int:
    """Print for each section whether it is equal, and where not, the lines; returns 1 if anything differs.

    Args:
        a, b: folders of snapshots.
        only: sections; all that either has, if None.
        limit: lines of the difference of one file that are shown.
    """
    # The text of PTX belongs to hashes that are compared already.
    folders = {path.name for root in (a, b) for path in root.iterdir() if path.is_dir()} - {"ptx_text"}
    different = 0
    for section in sorted(only or folders):
        files = {path.relative_to(root) for root in (a, b) for path in (root / section).rglob("*") if path.is_file()}
        texts = {name: (_lines(a / name), _lines(b / name)) for name in sorted(files)}
        unequal = [name for name, (left, right) in texts.items() if left != right]
        if files and not unequal:
            lines = sum(len(left or []) for left, _ in texts.values())
            print(f"{section}: equal ({len(files)} files, {lines} lines)")
            continue
        different = 1
        print(f"{section}: " + (f"DIFFERENT in {len(unequal)} of {len(files)} files" if files else "MISSING in both"))
        for name in unequal:
            _show(name, *texts[name], limit)
            if section == "ptx" and None not in texts[name]:
                _explain_ptx(*texts[name])
    return different


def _lines(path: Path) -> list[str] | None:
    return path.read_text().splitlines() if path.is_file() else None


def _show(name: Path, left: list[str] | None, right: list[str] | None, limit: int) -> None:
    if left is None or right is None:
        print(f"  {name}: only in {'the second' if left is None else 'the first'}")
        return
    found = list(difflib.unified_diff(left, right, f"a/{name}", f"b/{name}", lineterm="", n=0))
    for line in found[:limit]:
        print(f"  {line[:400]}")
    if len(found) > limit:
        print(f"  ... {len(found) - limit} more lines")


def _explain_ptx(left: list[str], right: list[str]) -> None:
    """Say how many of the configurations that differ have the same instructions in another order."""
    first, second = collections.Counter(left), collections.Counter(right)
    gone, new = first - second, second - first
    order_free = [collections.Counter(re.sub(r" ptx=\w+", "", line) for line in c.elements()) for c in (gone, new)]
    same = (order_free[0] & order_free[1]).total()
    print(f"  {gone.total()} lines of the first have no equal in the second; of these {same} have the same "
          "instructions in another order")  # fmt: skip
