"""What the kernels compile to for each architecture, as PTX without names: equal hashes, equal machine code.

Triton's stages are run by hand up to PTX: no assembler, no cache, no GPU. Names that are taken out: of kernels, their
parameters and other symbols; what remains is numbered in order of appearance, as are registers. A renamed variable can
still change the order of instructions (Triton sorts by name what both branches of an `if` define), so there is a
second hash of the bag of instructions.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend

from moba_megatron.ops.triton import catalog

ARCHITECTURES = (80, 90, 100)

_DEBUG_SECTION = re.compile(r"^\s*\.section\s+\.debug\w*\s*\{.*?^\s*\}", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_LINE_INFO = re.compile(r"^\s*\.(?:loc|file)\b[^\n]*$", re.MULTILINE)
_FUNCTION = re.compile(r"\.(?:entry|func)\s+(?:\([^)]*\)\s*)?([\w$]+)")
_VARIABLE = re.compile(r"\.(?:global|shared|const|extern)\b[^;={(]*?\s([A-Za-z_$][\w$]*)\s*(?:\[|=|;)")
_REGISTER = re.compile(r"%(?:r|rd|rs|rh|p|f|fd|h|hh|b|rq)\d+\b")
_LABEL = re.compile(r"\$L_\w+")


def take(out: Path, architectures: Sequence[int] = ARCHITECTURES, jobs: int = 1, keep: bool = False) -> None:
    """Write `ptx/sm_80.txt` and so on: a line for each configuration, in order.

    Args:
        out: folder of the snapshot.
        architectures: 90 for sm_90.
        jobs: processes.
        keep: also write the PTX, as `ptx_text/sm_90/HASH.ptx`.
    """
    (out / "ptx").mkdir(parents=True, exist_ok=True)
    for architecture in architectures:
        configurations = catalog.configurations(architecture)
        folder = out / "ptx_text" / f"sm_{architecture}" if keep else None
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        began, lines = time.monotonic(), []
        for line in _mapped(lambda c, a=architecture, f=folder: _line(c, a, f), configurations, jobs):
            lines.append(line)
            if len(lines) % 50 == 0:
                seconds = time.monotonic() - began
                print(f"sm_{architecture}: {len(lines)} of {len(configurations)}, {seconds:.0f} s", file=sys.stderr)
        (out / "ptx" / f"sm_{architecture}.txt").write_text("".join(f"{line}\n" for line in sorted(lines)))


def compile_to_ptx(configuration: catalog.Configuration, architecture: int) -> tuple[str, dict[str, Any]]:
    """PTX of a configuration as Triton makes it, and what the compiler tells of it."""
    target = GPUTarget("cuda", architecture, 32)
    backend = make_backend(target)
    source = configuration.source()
    options = backend.parse_options({"num_warps": configuration.num_warps, "num_stages": configuration.num_stages})
    stages: dict[str, Callable[..., Any]] = {}
    backend.add_stages(stages, options, source.language)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    code = source.make_ir(
        target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
    )
    metadata: dict[str, Any] = {}
    for name, stage in stages.items():
        code = stage(code, metadata)
        if name == "ptx":
            return code, metadata
    raise RuntimeError(f"no PTX among the stages {list(stages)}")


def normalised(ptx: str) -> str:
    """PTX without comments, line information, and names; symbols and registers are numbered as they appear."""
    text = _LINE_INFO.sub("", _COMMENT.sub("", _DEBUG_SECTION.sub("", ptx)))
    found = [(match.start(), match[1]) for pattern in (_FUNCTION, _VARIABLE) for match in pattern.finditer(text)]
    names = dict.fromkeys(name for _, name in sorted(found))
    for number, name in enumerate(names):
        # Parameters carry the name of their function: NAME_param_3.
        text = re.sub(rf"(?<![\w$%.]){re.escape(name)}(?=_param_|_retval|(?![\w$]))", f"symbol{number}", text)
    text = _numbered(_LABEL, text, "$L")
    text = _numbered(_REGISTER, text, "%v")
    return "".join(f"{' '.join(line.split())}\n" for line in text.splitlines() if line.strip())


def bag_of_instructions(text: str) -> str:
    """The lines of normalised PTX in alphabetical order, with all registers and labels alike."""
    return "\n".join(sorted(re.sub(r"(%v|\$L)\d+", r"\1", text).splitlines()))


def _numbered(pattern: re.Pattern[str], text: str, prefix: str) -> str:
    seen: dict[str, str] = {}
    return pattern.sub(lambda match: seen.setdefault(match[0], f"{prefix}{len(seen)}"), text)


def _line(configuration: catalog.Configuration, architecture: int, folder: Path | None) -> str:
    values = sorted(str(int(v) if isinstance(v, bool) else v) for v in configuration.constexprs.values())
    types = [kind for kind in configuration.signature.values() if kind != "constexpr"]
    known = (
        f"sm_{architecture} warps={configuration.num_warps} stages={configuration.num_stages} "
        f"{configuration.element_type} values={','.join(values)} types={','.join(types)}"
    )
    try:
        ptx, metadata = compile_to_ptx(configuration, architecture)
    except Exception as error:  # whatever the compiler raises is the finding
        return f"{known} error {type(error).__name__}"
    text = normalised(ptx)
    strict = _hash(text)
    if folder:
        (folder / f"{strict}.ptx").write_text(text)
    sizes = f"shared={metadata['shared']} columns={metadata['tmem_size']} warps={metadata['num_warps']}"
    return f"{known} {sizes} lines={text.count(chr(10))} ptx={strict} bag={_hash(bag_of_instructions(text))}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _mapped(function: Callable[[Any], str], items: list[Any], jobs: int) -> Any:
    """`map` in forked processes, which kernels cannot be sent to: each takes its items by number."""
    if jobs == 1:
        return map(function, items)
    global _work
    _work = lambda number: function(items[number])  # noqa: E731
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        return pool.map(_by_number, range(len(items)), chunksize=1)


_work: Callable[[int], str]


def _by_number(number: int) -> str:
    return _work(number)
