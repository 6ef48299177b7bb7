"""What the kernels compile to, read from the machine code, for chips that are not at hand.

`python -m moba_megatron.ops.triton.compiled` compiles every configuration of `catalog` for A100, H100 and B200, prints
registers, shared memory and stack of each, and ends with an error if one does not compile, does not fit its chip,
spills registers, or multiplies 16-bit matrices without matrix instructions.

A kernel's stack holds registers that did not fit, and arrays that are indexed at run time. The assembler puts the
former at fixed distances from the stack pointer, so instructions tell them apart: a load or store at `[R1 + number]` is
a spill. The kernels have no such arrays.

Needs the tools `cuobjdump` and `nvdisasm` that come with Triton, and no GPU.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import triton

from moba_megatron.ops.triton import catalog

# Bytes of shared memory a program may have; for sm_80, on the smallest chips that take its tiles (8.6, 8.9, 12.0).
SHARED_BYTES = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Columns of tensor memory, which only sm_100 has: a kernel that needs more compiles to a trap.
TENSOR_COLUMNS = 512
MATRIX_INSTRUCTIONS = {80: ("mma.sync",), 90: ("wgmma", "mma.sync"), 100: ("tcgen05.mma", "mma.sync")}
WITHOUT_PRODUCTS = (
    "add_groups", "average_means", "block_means", "centre_means", "combine_dkdv", "combine_dq", "combine_out",
    "count_entries", "decode_fwd", "gather_entries", "output_delta_rows", "rank_chunks", "scatter_entries",
    "split_entries", "split_means", "split_spans",
)  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """What one configuration compiles to.

    Attributes:
        architecture: 90 for sm_90.
        registers: of a thread.
        shared: bytes of a program.
        stack: bytes of a thread.
        spills: instructions that move registers to the stack or back.
        columns: of tensor memory.
        matrix: the matrix instruction that is used, "-" for none.
        problem: what is wrong; empty if nothing is.
    """

    architecture: int
    kernel: str
    dtype: str
    sizes: str
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spills: int = 0
    columns: int = 0
    matrix: str = "-"
    problem: str = ""


def compile_one(configuration: catalog.Configuration, architecture: int) -> Compiled:
    """Compile a configuration and read its machine code; a failure is told in `problem`."""
    sizes = " ".join(f"{name}={int(value)}" for name, value in configuration.constexprs.items())
    settings = f"{sizes} warps={configuration.num_warps} stages={configuration.num_stages}"
    named = dict(architecture=architecture, kernel=configuration.name, dtype=configuration.element_type, sizes=settings)
    try:
        code = configuration.compile(architecture)
    except Exception as error:  # whatever the compiler or the assembler raises is the finding
        return Compiled(**named, problem=f"does not compile: {type(error).__name__}: {str(error)[:200]}")
    registers, stack, spills = _read(code.asm["cubin"])
    matrix = next((name for name in MATRIX_INSTRUCTIONS[architecture] if name in code.asm["ptx"]), "-")
    columns = getattr(code.metadata, "tmem_size", 0)
    row = Compiled(**named, registers=registers, shared=code.metadata.shared, stack=stack, spills=spills,
                   columns=columns, matrix=matrix)  # fmt: skip
    return replace(row, problem=_problem(row))


def _problem(row: Compiled) -> str:
    if row.shared > SHARED_BYTES[row.architecture]:
        return f"needs {row.shared} bytes of shared memory, the chip has {SHARED_BYTES[row.architecture]}"
    if row.columns > TENSOR_COLUMNS:
        return f"needs {row.columns} columns of tensor memory, the chip has {TENSOR_COLUMNS}"
    if row.spills:
        return f"spills registers: {row.spills} instructions"
    if row.matrix == "-" and row.kernel not in WITHOUT_PRODUCTS and row.dtype != "fp32":
        return "multiplies matrices without matrix instructions"
    return ""


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _read(cubin: bytes) -> tuple[int, int, int]:
    """Registers, stack bytes and spill instructions of a compiled object with one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(_tool("cuobjdump"), "--dump-resource-usage", file.name)
        registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
        code = _output(_tool("nvdisasm"), "-c", file.name) if stack else ""
    return registers, stack, len(re.findall(r"\b(?:STL|LDL)\S* [^;]*\[R1(?:\+0x[0-9a-f]+)?\]", code))


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


Job = tuple[catalog.Configuration, int]
# Of a worker process. Kernels cannot be sent to it, but it has them from the start.
_jobs: list[Job] = []


def _start_worker(jobs: list[Job], cache: str) -> None:
    _jobs[:] = jobs
    os.environ["TRITON_CACHE_DIR"] = cache


def _compile_job(number: int) -> Compiled:
    return compile_one(*_jobs[number])


def compile_all(jobs: list[Job], processes: int, cache: str | Path) -> Iterator[Compiled]:
    """Compile configurations in parallel; results come in order.

    Args:
        jobs: configurations and their architectures.
        processes: how many at once.
        cache: folder in which Triton keeps compiled kernels.
    """
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, context, _start_worker, (jobs, str(cache))) as pool:
        yield from pool.map(_compile_job, range(len(jobs)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile all for all architectures; the exit status is the number of problems, at most 1."""
    parser = argparse.ArgumentParser(prog="python -m moba_megatron.ops.triton.compiled", description=__doc__)
    parser.add_argument("--architectures", type=int, nargs="+", choices=SHARED_BYTES, default=list(SHARED_BYTES))
    parser.add_argument("--only", default="", help="regular expression on kernel, dtype and sizes")
    parser.add_argument("--output", type=Path, help="CSV file")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    settings = parser.parse_args(arguments)
    jobs = [
        (configuration, architecture)
        for architecture in settings.architectures
        for configuration in catalog.configurations(architecture)
        if re.search(settings.only, str(configuration))
    ]
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for row in compile_all(jobs, settings.processes, cache):
            rows.append(row)
            print(_line(row), flush=True)
    if settings.output:
        _write(settings.output, rows)
    wrong = [row for row in rows if row.problem]
    print(f"{len(rows)} configurations, {len(wrong)} with a problem", *map(_line, wrong), sep="\n")
    return 1 if wrong else 0


def _line(row: Compiled) -> str:
    numbers = f"{row.registers:>4} registers {row.shared:>7} shared {row.stack:>4} stack  {row.matrix:<11}"
    return f"sm_{row.architecture:<4}{numbers} {row.kernel} {row.dtype} {row.sizes} {row.problem}".rstrip()


def _write(path: Path, rows: list[Compiled]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [column.name for column in fields(Compiled)])
        writer.writeheader()
        writer.writerows(map(asdict, rows))


if __name__ == "__main__":
    sys.exit(main())
