"""The search for tiles: what it tries, what it keeps, and the table that it writes."""

from pathlib import Path

import pytest
from rich.console import Console

from moba_megatron.benchmark.settings import BenchSettings
from moba_megatron.benchmark.tune import candidates, improve, kernels_of, place_of, run_tune, table_text
from moba_megatron.ops.triton import tile_table

CHOICE = [(64, 16, 4, 3), (64, 64, 4, 3), (64, 128, 8, 1)]


def test_the_fastest_tile_that_runs_stays():
    choice = list(CHOICE)

    def seconds():
        rows, keys, warps, stages = choice[2]
        if (rows, keys) == (128, 128):
            return None  # does not fit
        return 1.0 - 0.2 * (rows == 32) - 0.1 * (keys == 64) - 0.005 * (warps == 4)

    assert improve(choice, 2, candidates("causal_fwd", CHOICE, 2), seconds) == pytest.approx(0.305)
    assert choice == [*CHOICE[:2], (32, 64, 4, 1)]


def test_a_small_gain_changes_nothing_and_what_cannot_run_is_told():
    choice = list(CHOICE)
    assert improve(choice, 1, candidates("causal_fwd", CHOICE, 1), lambda: 1.0 - 0.005 * (choice[1][0] == 128)) == 0
    assert improve(choice, 1, candidates("causal_fwd", CHOICE, 1), lambda: None) is None
    assert choice == CHOICE


def test_keys_vary_only_where_a_kernel_streams_them():
    assert {tile[1] for tile in candidates("causal_fwd", CHOICE, 2)} == {32, 64, 128}
    assert {tile[1] for tile in candidates("causal_fwd", CHOICE, 1)} == {64}
    assert {tile[1] for tile in candidates("past_fwd_short", CHOICE, 2)} == {128}
    assert CHOICE[2] not in candidates("causal_fwd", CHOICE, 2)
    assert [place_of(CHOICE, keys) for keys in (0, 16, 17, 128, 512)] == [0, 0, 1, 2, 2]


def test_every_kernel_of_the_table_is_tuned_by_some_block():
    tuned = {kernel for each in (True, False) for kernel, _ in kernels_of(each, each, each)}
    assert all(tuned == set(choices) for choices in tile_table.TILES.values())
    # Blocks are screened for 16-bit queries alone.
    assert tuned - {"screen"} == set(tile_table.FP32_TILES)


def test_the_written_table_is_the_file():
    source = Path(tile_table.__file__).read_text()
    assert table_text(source, tile_table.TILES, tile_table.FP32_TILES) == source


def test_without_a_gpu_it_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--tune needs a CUDA device, not cpu"):
        run_tune(BenchSettings(), tmp_path, Console())


def test_luck_does_not_stay():
    choice, seen = list(CHOICE), set()

    def seconds():
        first = choice[2] not in seen
        seen.add(choice[2])
        return 0.5 if first and choice[2] == (32, 64, 4, 1) else 1.0

    assert improve(choice, 2, candidates("causal_fwd", CHOICE, 2), seconds) == 0 and choice == CHOICE
