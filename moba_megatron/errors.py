"""Error handling of `train.py` and all commands: an error that the user can fix becomes a message and exit code 2.

These are our own exceptions, `ValueError`s that our code raises by `raise`, errors of the system (a full disk, a
missing or forbidden file, a folder in the place of a file), and errors of libraries about files that they cannot read.
Any other exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import dis
import errno
import io
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

_ROOT = str(Path(__file__).parent) + os.sep
_LONGEST = 800
# Exceptions of libraries that read what a user gives: the package, and the class that its errors descend from.
_READERS = (
    *(("json", "JSONDecodeError"), ("yaml", "YAMLError"), ("omegaconf", "OmegaConfBaseException")),
    *(("pydantic_core", "ValidationError"), ("safetensors", "SafetensorError"), ("pyarrow", "ArrowException")),
    *(("zstandard", "ZstdError"), ("zlib", "error"), ("_lzma", "LZMAError"), ("zipfile", "BadZipFile")),
    *(("datasets", "DatasetsError"), ("jinja2", "TemplateError"), ("huggingface_hub", "HfHubHTTPError")),
    *(("wandb", "Error"), ("concurrent", "BrokenExecutor"), ("builtins", "UnicodeError"), ("builtins", "EOFError")),
)
# Libraries whose `ValueError`s speak of what they were given to read.
_OF_READERS = ("transformers", "tokenizers", "huggingface_hub", "datasets", "lm_eval", "pathlib", "json", "omegaconf")
_FULL = (errno.ENOSPC, errno.EDQUOT)
# What the system says, and the fix.
_FIXES = {
    errno.ENOENT: "no such file or folder: correct the path",
    errno.EACCES: "not permitted: give this user access, or name another place",
    errno.EPERM: "not permitted: give this user access, or name another place",
    errno.EROFS: "is on a read-only disk: name another place",
    errno.EISDIR: "is a folder, not a file: correct the path",
    errno.ENOTDIR: "leads through a file: correct the path",
    errno.EEXIST: "exists already: name another place, or move it away",
    errno.ENOTEMPTY: "is a folder that is not empty: name another place, or move it away",
    errno.ENAMETOOLONG: "has a name that is too long for this disk: shorten it",
    errno.ELOOP: "is a link to itself: correct it",
    errno.EMFILE: "too many open files: raise the limit (ulimit -n), or use fewer workers",
    errno.ENFILE: "too many open files on this machine: close some, or use fewer workers",
    errno.EIO: "the disk fails to read or write it (input/output error): see the system's log, and try another disk",
    errno.ESTALE: "is gone on its network disk (stale file handle): mount it again, and run the same command again",
    errno.ENOMEM: "the machine has no memory left: close other programs, or use smaller sizes",
}


def explained(error: BaseException) -> str | None:
    """The message for a user about an exception, without a traceback; None for a bug of ours."""
    if isinstance(error, OSError) or _no_space(str(error)):
        return _with_notes(error, describe_os_error(error))
    if "EADDRINUSE" in str(error):  # PyTorch's store, in its own class
        return (
            f"MASTER_PORT = {os.environ.get('MASTER_PORT', '')} is in use on this machine, maybe by another training: "
            "take another port (torchrun --master-port, or --standalone)"
        )
    if isinstance(error, MemoryError):
        return _with_notes(error, f"not enough memory: {error or 'the machine has none left'}: use smaller sizes")
    if _is_ours(error) or _of_a_reader(error):
        return _with_notes(error, _short(error))
    if isinstance(error, ValueError) and (_raised_on_purpose(error) or "null byte" in str(error)):
        return _with_notes(error, _short(error))
    return None


def describe_os_error(error: BaseException) -> str:
    """An error of the system: the file, the problem and the fix. For a full disk also the bytes needed (`error.needed`,
    if the writer knows it) and the free bytes."""
    path, number = _path_of(error), getattr(error, "errno", None)
    if number in _FULL or _no_space(str(error)):
        return _full_disk(path, error)
    fix = _FIXES.get(number or 0)
    second = getattr(error, "filename2", None)
    where = f"{path} or {_text(second)}" if path and second else path
    if fix:
        return f"{where}: {fix}" if where else _short(error)
    said = (getattr(error, "strerror", None) or "") if number else ""
    return f"{where}: {said}" if where and said else _short(error)


@contextmanager
def user_errors(apart: bool = False) -> Iterator[None]:
    """Handle the errors of a command, as a context or a decorator: exit with a message and code 2 if the user can fix
    it, with 130 after Ctrl-C; a bug of ours passes unchanged. Notes of an exception (`add_note`) follow its message.

    Args:
        apart: print each problem on a line of its own, for files that are not the configuration of a training.
    """
    import typer

    try:
        yield
    except KeyboardInterrupt as error:
        print("; ".join(["stopped", *getattr(error, "__notes__", [])]), file=sys.stderr)
        raise typer.Exit(130) from error
    except BrokenPipeError as error:
        if error.filename is None:  # whoever read the output has gone; click knows what to do
            raise
        _tell(error, apart)
        raise typer.Exit(2) from error
    except Exception as error:
        if explained(error) is None:
            raise
        _tell(error, apart)
        raise typer.Exit(2) from error


@contextmanager
def with_note(note: str) -> Iterator[None]:
    """Add the next step for the user to system errors and to Ctrl-C."""
    try:
        yield
    except (OSError, KeyboardInterrupt, MemoryError) as error:
        error.add_note(note)
        raise
    except Exception as error:
        if _of_a_reader(error) or _no_space(str(error)):
            error.add_note(note)
        raise


def _tell(error: Exception, apart: bool) -> None:
    problems = getattr(error, "problems", None) if apart else None
    for text in problems or [explained(error)]:
        print(f"error: {text}", file=sys.stderr, flush=True)


def _with_notes(error: BaseException, text: str) -> str:
    return "; ".join([text, *getattr(error, "__notes__", [])])


def _is_ours(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0] == "moba_megatron"


def _of_a_reader(error: BaseException) -> bool:
    """Whether an error of a library means that it cannot read a file."""
    for kind in type(error).__mro__:
        if (kind.__module__.split(".")[0], kind.__name__) in _READERS:
            return True
    last = _last(error.__traceback__)
    if last is None:
        return False
    library = str(last.tb_frame.f_globals.get("__name__", "")).split(".")[0]
    return isinstance(error, ValueError | RecursionError) and library in (*_OF_READERS, "yaml")


def _raised_on_purpose(error: ValueError) -> bool:
    """Whether a `raise` of this package threw it, and not an operation that went wrong there."""
    remote = str(error.__cause__) if type(error.__cause__).__name__ == "_RemoteTraceback" else ""
    if remote:  # of a worker process there is only the text
        lines = remote.splitlines()
        places = [number for number, line in enumerate(lines) if line.startswith('  File "')]
        return bool(places) and _ROOT in lines[places[-1]] and lines[places[-1] + 1].lstrip().startswith("raise ")
    last = _last(error.__traceback__)
    if last is None:
        return False
    code = last.tb_frame.f_code
    return code.co_filename.startswith(_ROOT) and code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _last(traceback: TracebackType | None) -> TracebackType | None:
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback


def _no_space(text: str) -> bool:
    """Whether the message of a library means that a disk is full: Rust, NumPy, PyTorch."""
    return (
        "No space left on device" in text
        or "PytorchStreamWriter failed writing" in text
        or re.fullmatch(r"\d+ requested and \d+ written", text) is not None
    )


def _full_disk(path: str, error: BaseException) -> str:
    needed = getattr(error, "needed", None)
    wanted = f"{needed:,} bytes were to be written, " if needed is not None else ""
    folder = Path(path).absolute() if path else Path.cwd()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    try:
        free = f"{wanted}{shutil.disk_usage(folder).free:,} are free"
    except OSError:
        free = wanted.rstrip(", ")
    quota = " or this user's share of it is used up" if getattr(error, "errno", None) == errno.EDQUOT else ""
    return f"{path or 'a file'}: the disk is full{quota} ({free}): make room, or name a place on another disk"


def _path_of(error: BaseException) -> str:
    return _text(getattr(error, "filename", None)) or _file_at_hand(error.__traceback__)


def _file_at_hand(traceback: TracebackType | None) -> str:
    """The file that the innermost function with an open one was using: errors from write and close do not name the
    file."""
    found = ""
    while traceback is not None:
        frame = traceback.tb_frame
        for value in frame.f_locals.values():
            if isinstance(value, io.IOBase) and isinstance(name := getattr(value, "name", None), str | bytes):
                found = _text(name)
        if frame.f_globals.get("__name__", "").startswith("pathlib") and isinstance(frame.f_locals.get("self"), Path):
            found = str(frame.f_locals["self"])
        traceback = traceback.tb_next
    return found


def _text(name: object) -> str:
    if isinstance(name, bytes):
        return os.fsdecode(name)
    # A number is that of an open file.
    return "" if name is None or isinstance(name, int) else str(name)


def _short(error: BaseException) -> str:
    text = str(error).strip()
    if not _is_ours(error) and not (isinstance(error, ValueError) and _raised_on_purpose(error)):
        text = " ".join(text.split())
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
