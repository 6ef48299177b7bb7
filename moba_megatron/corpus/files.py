"""Input files: the files that a path or a pattern names, and the kind of each.

A path that exists is taken literally, whatever its characters. Only a path that does not exist is a pattern, in which
`**` is any number of folders. Links are followed in folders and in patterns. A file with several names is read once,
under its own name rather than a link's. A link to a folder above it is not followed.

The skipped files are reported: hidden files and folders (`.git`, `.ipynb_checkpoints`, `._name`) unless the pattern
itself has the dot, further names of a file, and broken links.
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
HIDDEN = "hidden: name it by a pattern of its own if it is text"
_WILD = "*?["


@dataclass
class Found:
    """The files of a path or a pattern.

    Attributes:
        root: the folder that names are relative to.
        names: of the files, with `/`, sorted.
        left_out: (name, why) of what was passed over.
    """

    root: Path
    names: list[str] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)


def find_files(path: str, kind: str | None = None) -> Found:
    """The files that a path means: a file, a folder or a pattern. Names are whole paths, `root` is `.`.

    Args:
        kind: of a folder, only files with the endings of this kind are taken.
    """
    if os.path.isfile(path):
        return Found(Path("."), [path])
    if os.path.isdir(path):
        found = match_files(Path(path), "**/*")
        parts = kind == "jsonl"
        names = [n for n in found.names if kind in (None, kind_by_name(n)) or (parts and is_part(n))]
    else:
        root, pattern = split_pattern(path)
        found = match_files(Path(root), pattern)
        names = found.names
    left_out = [(_joined(found.root, name), why) for name, why in found.left_out]
    return Found(Path("."), [_joined(found.root, name) for name in names], left_out)


def no_match(where: str) -> str:
    """Text of the error for a path or a pattern that means no file."""
    return (
        f"no documents: no file matches {where}; relative paths count from {Path.cwd()}: correct the path, or the "
        "working directory"
    )


def split_pattern(path: str) -> tuple[str, str]:
    """(folder, pattern relative to it) of a path with a pattern in it. An existing path is taken literally.

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
    walk = _Walk(root, pattern.split("/"))
    walk.enter("", ())
    # Own names come first, then those that lead over a link.
    files = sorted(walk.files, key=lambda file: (file[1], file[0]))
    first: dict[str, str] = {}
    found = Found(root, left_out=walk.left_out)
    for name, _ in files:
        real = os.path.realpath(root / name)
        if first.setdefault(real, name) is name:
            found.names.append(name)
        else:
            found.left_out.append((name, f"the same file as {first[real]}"))
    found.names.sort()
    found.left_out.sort()
    return found


class _Walk:
    """Collects the files below `root` that a pattern fits, with whether a link leads to them."""

    def __init__(self, root: Path, wanted: list[str]):
        self.root, self.wanted = root, wanted
        self.files: list[tuple[str, bool]] = []
        self.left_out: list[tuple[str, str]] = []

    def enter(self, folder: str, above: tuple[tuple[int, int], ...], linked: bool = False) -> None:
        """Look at a folder; `above` are the folders that it lies in, by device and inode."""
        try:
            status = (self.root / folder).stat()
            entries = sorted(os.scandir(self.root / folder), key=lambda entry: entry.name)
        except OSError as error:
            self._pass_over(folder, error)
            return
        own = (status.st_dev, status.st_ino)
        if own in above:
            self.left_out.append((folder, "a link to a folder above it"))
            return
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            try:
                self._take(entry, name, (*above, own), linked)
            except OSError as error:
                self._pass_over(name, error)

    def _take(self, entry: os.DirEntry, name: str, above: tuple, linked: bool) -> None:
        parts, is_link = name.split("/"), entry.is_symlink()
        is_folder = entry.is_dir()
        if not (_may_hold(parts, self.wanted) if is_folder else _fits(parts, self.wanted)):
            return
        if entry.name.startswith(".") and not _dotted(parts, self.wanted):
            self.left_out.append((name, HIDDEN))
        elif is_folder:
            self.enter(name, above, linked or is_link)
        elif entry.is_file():
            self.files.append((name, linked or is_link))
        elif is_link:
            self.left_out.append((name, "a link that leads nowhere"))

    def _pass_over(self, name: str, error: OSError) -> None:
        if name:
            self.left_out.append((name, error.strerror or str(error)))
        elif not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error


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
