"""The cost model of the GPU kernels: bytes and operations against a roofline worked out by hand, and its table."""

import csv
import io
from dataclasses import replace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from moba_megatron.benchmark.expected import model_rows, run_model
from moba_megatron.cli import app
from moba_megatron.ops.kernel_sizes import screens
from moba_megatron.planning.kernel_model import (
    LAUNCH_SECONDS,
    MACHINES,
    AttentionSizes,
    Work,
    backward_work,
    dense_seconds,
    expected_seconds,
    forward_work,
    route_work,
)

# Bytes and operations per second seen on an H200, for which the hand-made figures were worked out.
BANDWIDTH, RATE = 4.3e12, 790e12


def sizes(block_size, top_k):
    return AttentionSizes(2**17, 32, 8, 128, block_size, top_k)


def milliseconds(works, what, rate):
    return sum(getattr(work, what) for work in works) / rate * 1e3


# 128K tokens, N = 32, G = 8, D = 128, to a unit of the last digit: products of the forward pass; its memory with bf16
# and with fp32 partial outputs; memory and products of the backward pass over past blocks, fused and split.
ROOFLINE = {
    (64, 16): (2.7, 12.1, 19.6, (15.0, 6.5), (22.6, 9.1)),
    (128, 8): (2.6, 6.0, 9.5, (7.0, 6.1), (10.6, 8.5)),
    (512, 3): (3.5, 2.3, 3.3, None, (3.0, 9.7)),
    (4096, 12): (105, 7.6, 12.0, None, (13.5, 348)),
}


@pytest.mark.parametrize("block", ROOFLINE)
def test_the_roofline_of_the_design(block):
    products, memory, wide_memory, fused, split = ROOFLINE[block]

    def near(value, printed):
        return value == pytest.approx(printed, abs=1 if isinstance(printed, int) else 0.06)

    case = sizes(*block)
    *_, past, own = forward_work(case)
    assert near(milliseconds([past, own], "products", RATE), products)
    assert near(milliseconds([past, own], "bytes", BANDWIDTH), memory)
    assert near(milliseconds(forward_work(replace(case, partial_bytes=4))[-2:], "bytes", BANDWIDTH), wide_memory)
    for expected, is_fused in ((fused, True), (split, False)):
        if expected is not None:
            works = backward_work(case, fused=is_fused)
            assert near(milliseconds(works, "entry_bytes", BANDWIDTH), expected[0])
            past = [work for work in works if work.name.startswith("past blocks")]
            assert len(past) == (1 if is_fused else 2) and near(milliseconds(past, "products", RATE), expected[1])
    assert dense_seconds(case, MACHINES[2], False) * MACHINES[2].peak * 0.6 / RATE == pytest.approx(0.178, abs=5e-4)


@pytest.mark.parametrize(("block", "floor"), [((64, 16), 14), ((128, 8), 6), ((512, 3), 1)])
def test_selection_is_the_cost_of_routing_in_one_walk(block, floor):
    """The estimate behind the instructions of a score: about 14, 6 and 1 ms on an H200."""
    (route,) = route_work(sizes(*block), screened=False)
    machine = next(machine for machine in MACHINES if machine.name == "H200")
    assert route.instructions / machine.lanes * 1e3 == pytest.approx(floor, rel=0.15)
    assert route.seconds(machine) >= route.instructions / machine.lanes


def test_screening_reads_a_sixth_of_the_planes():
    """At a million tokens with blocks of 64, by hand: 2^18 tiles of 128 rows on 8 kv heads, each 8,192 blocks of 256
    bytes twice; and a list of 17.25 means in fp32 for each of 2^25 rows."""
    case = replace(sizes(64, 16), tokens=2**20)
    (whole,), (screen, listed) = route_work(case, screened=False), route_work(case, screened=True)
    assert screen.cache_bytes == pytest.approx(2**18 * 8192 * 256 * 2, rel=1e-3)
    assert whole.cache_bytes == pytest.approx(3 * screen.cache_bytes)
    assert listed.cache_bytes == pytest.approx(2**25 * 17.25 * 512)
    assert screen.products * 3 == whole.products * 2


@pytest.mark.parametrize("block", [(64, 16), (128, 8), (512, 3), (32, 16), (16, 2)])
def test_blocks_are_screened_from_where_that_is_faster(block):
    """The rule of `kernel_sizes` on an H100: from twice its number of blocks on screening is faster, below half of it
    slower, and between them it loses a quarter at most."""
    machine = next(machine for machine in MACHINES if machine.name == "H100")

    def gain(tokens):
        case = replace(sizes(*block), tokens=tokens)
        whole, screened = (sum(w.seconds(machine) for w in route_work(case, screened=s)) for s in (False, True))
        assert len(route_work(case)) == 1 + screens(tokens // block[0], block[1] - 1, 2)
        return whole / screened

    first = next(2**n for n in range(10, 22) if screens(2**n // block[0], block[1] - 1, 2))
    assert gain(2 * first) > 1 and gain(first) > 0.8 and gain(first // 4) < 1


def test_a_kernel_takes_its_longest_time_and_its_launches():
    machine = MACHINES[0]
    assert Work("nothing", launches=3).seconds(machine) == 3 * LAUNCH_SECONDS
    slow = Work("x", products=machine.peak, stream_bytes=1.0).seconds(machine)
    assert slow > 2 and Work("x", products=machine.peak, stream_bytes=1e12).seconds(machine) == slow


def test_covered_documents_take_the_time_of_full_attention():
    short = replace(sizes(512, 3), tokens=1536)
    for machine in MACHINES:
        assert expected_seconds(short, machine, True) == dense_seconds(short, machine, True)
        assert expected_seconds(sizes(512, 3), machine, True) < dense_seconds(sizes(512, 3), machine, True) / 10


def test_the_table_covers_the_grid(tmp_path):
    text = io.StringIO()
    rows = run_model(tmp_path, Console(file=text, width=100))
    assert rows == model_rows()
    assert {row.length for row in rows} == {2**n for n in range(13, 21)} and len(rows) == 4 * 2 * (8 * 5 - 3)
    assert all(0 < row.forward_seconds < row.both_seconds for row in rows)
    assert len(list(csv.DictReader(open(tmp_path / "model.csv")))) == len(rows)
    for word in ("A100", "B200", "1048576", "own block + combine", "not measured"):
        assert word in text.getvalue()
    result = CliRunner().invoke(app, ["bench", "--model", "--output", str(tmp_path)])
    assert result.exit_code == 0 and "expected ms forward" in result.output
