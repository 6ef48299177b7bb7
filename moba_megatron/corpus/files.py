"""Files as they lie about: which files a path or a pattern means, and what kind of file each is.

A path that exists is that path, whatever characters it has; only what does not exist is read as a pattern, in which
`**` is any number of folders. Links are followed, in folders and in patterns alike;
each folder is entered once, so that links in a circle end, and under its own name rather than a link's.

Hidden files and folders (`.git`, `.ipynb_checkpoints`, `._name`) are left out and told of, unless the pattern names
them by a dot of its own.
"""

from __future__ import annotations

import fnmatch
import os
from dataclasses import dataclass, field
from pathlib import Path

from moba_megatron.corpus.documents import MIB

COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
ENDINGS = {
    "jsonl": (".jsonl", ".ndjson", ".jsonlines", ".json"),
    "parquet": (".parquet", ".parq", ".pq"),
    "arrow": (".arrow", ".feather", ".ipc"),
}
"""Kinds of source, and the endings that their files have, in any case; those of JSONL with one for compression."""
_WILD = "*?["


@dataclass
class Found:
    """What a path or a pattern means.

    Attributes:
        root: the folder that names are relative to.
        names: of the files, with `/`, sorted.
        hidden: files and folders that were left out because they are hidden.
    """

    root: Path
    names: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)


def find_files(path: str, kind: str | None = None) -> Found:
    """The files that a path means: a file, a folder or a pattern. Names are whole paths, `root` is `.`.

    Args:
        kind: of a folder, only files with the endings of this kind are taken.
    """
    if os.path.isfile(path):
        return Found(Path("."), [path])
    if os.path.isdir(path):
        found = match_files(Path(path), "**/*")
        names = [name for name in found.names if kind is None or kind_by_name(name) == kind or _is_row_part(name, kind)]
    else:
        root, pattern = split_pattern(path)
        found = match_files(Path(root), pattern)
        names = found.names
    names, hidden = ([_joined(found.root, name) for name in some] for some in (names, found.hidden))
    return Found(Path("."), names, hidden)


def split_pattern(path: str) -> tuple[str, str]:
    """(folder, pattern relative to it) of a path with a pattern in it. What exists is taken literally.

    >>> split_pattern("no/such/**/*.txt")
    ('no/such', '**/*.txt')
    """
    parts = Path(path).parts
    fixed = 0
    while fixed < len(parts) - 1 and (
        not any(c in parts[fixed] for c in _WILD) or os.path.isdir(os.path.join(*parts[: fixed + 1]))
    ):
        fixed += 1
    return (os.path.join(*parts[:fixed]) if fixed else "."), "/".join(parts[fixed:])


def match_files(root: Path, pattern: str) -> Found:
    """The files below a folder whose path relative to it a pattern fits."""
    found, wanted = Found(root), pattern.split("/")
    seen: set[tuple[int, int]] = set()
    # Folders that links lead to wait until all folders have been entered under their own names.
    waiting = [""]
    while waiting:
        links: list[str] = []
        for folder in sorted(waiting):
            _enter(found, folder, wanted, seen, links)
        waiting = links
    found.names.sort()
    found.hidden.sort()
    return found


def _enter(found: Found, folder: str, wanted: list[str], seen: set[tuple[int, int]], links: list[str]) -> None:
    place = found.root / folder
    try:
        status = place.stat()
    except OSError:
        return
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    with os.scandir(place) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            name = f"{folder}/{entry.name}" if folder else entry.name
            parts = name.split("/")
            is_folder = entry.is_dir()
            if not (_may_hold(parts, wanted) if is_folder else _fits(parts, wanted)):
                continue
            if entry.name.startswith(".") and not _dotted(parts, wanted):
                found.hidden.append(name)
            elif is_folder and entry.is_symlink():
                links.append(name)
            elif is_folder:
                _enter(found, name, wanted, seen, links)
            elif entry.is_file():
                found.names.append(name)


def _fits(parts: list[str], wanted: list[str]) -> bool:
    """Whether a relative path fits a pattern."""
    if not wanted:
        return not parts
    if wanted[0] == "**":
        # As the last part, `**` stands for folders and everything in them.
        rest = wanted[1:]
        return bool(parts) and (not rest or any(_fits(parts[n:], rest) for n in range(len(parts))))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], wanted[0]) and _fits(parts[1:], wanted[1:])


def _may_hold(parts: list[str], wanted: list[str]) -> bool:
    """Whether something below a folder could fit a pattern."""
    if not parts:
        return bool(wanted)
    if not wanted:
        return False
    return wanted[0] == "**" or (fnmatch.fnmatchcase(parts[0], wanted[0]) and _may_hold(parts[1:], wanted[1:]))


def _dotted(parts: list[str], wanted: list[str]) -> bool:
    """Whether the pattern itself asks for hidden names at this place."""
    return any(part.startswith(".") and fnmatch.fnmatchcase(parts[-1], part) for part in wanted)


def _is_row_part(name: str, kind: str) -> bool:
    return kind == "jsonl" and is_part(name)


def _joined(root: Path, name: str) -> str:
    return name if str(root) == "." else f"{root}/{name}"


def kind_by_name(name: str) -> str | None:
    """The kind of source that reads files of this name; None: no ending says so.

    >>> kind_by_name("A.NDJSON.GZ"), kind_by_name("a.parquet"), kind_by_name("notes.txt")
    ('jsonl', 'parquet', None)
    """
    stem, ending = os.path.splitext(name.lower())
    if ending in COMPRESSED:
        return "jsonl" if os.path.splitext(stem)[1] in ENDINGS["jsonl"] else None
    return next((kind for kind, endings in ENDINGS.items() if ending in endings), None)


def is_part(name: str) -> bool:
    """Whether a file is a part of what Spark or Hadoop wrote, whose names need no ending.

    >>> is_part("out/part-00000"), is_part("part-00000.gz"), is_part("part-one.txt")
    (True, True, False)
    """
    stem, ending = os.path.splitext(os.path.basename(name))
    return stem.startswith("part-") and (not ending or ending.lower() in COMPRESSED) and "." not in stem


def readable_size(number: int) -> str:
    """Bytes for people.

    >>> readable_size(64 * 2**20), readable_size(1500)
    ('64 MiB', '1,500 bytes')
    """
    return f"{number // MIB:,} MiB" if number >= MIB else f"{number:,} bytes"
