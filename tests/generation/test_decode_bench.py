"""The benchmark of decoding measures what it says, at a size of a test."""

from __future__ import annotations

from moba_megatron.generation.bench import DecodeSettings, measure, table


def test_every_length_is_measured_and_shown():
    settings = DecodeSettings(lengths=(64, 200), prefill_up_to=64, block_size=16, layers=1, head_size=8, runs=1)
    rows = measure(settings)
    assert [row.tokens for row in rows] == [64, 200]
    assert all(row.step_full > 0 and row.step_moba > 0 and row.step_moba_dynamic_cache > 0 for row in rows)
    assert rows[0].prefill_moba > 0 and rows[1].prefill_full is None
    assert table(rows).count("\n") == 4 and "| 200 |" in table(rows)
