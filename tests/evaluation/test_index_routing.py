"""Evaluations of a model with an index: its choice beside those of the attention's own queries and keys."""

from __future__ import annotations

from pathlib import Path

import pytest
from distributed import run_ranks
from small_run import small_config, train_here
from test_evaluate_ranks import on_ranks, records, same

INDEXES = {
    "by_key": {"router_dim": 6},
    "copied": {
        "router_dim": 8, "router_heads": "query", "router_keys": "key", "router_norm": "none", "router_init": "copied"
    },
}  # fmt: skip
ASKED = ["--attention", "moba", "--routing", "--routing-samples", 3]
NAME = "routing_step_1_moba.json"


def trained(kind: str, tmp_path: Path, **others: str) -> Path:
    """One step, which changes nothing: weights differ in the index alone. The last of 4 layers is full."""
    index = {f"attention__{name}": value for name, value in {**INDEXES[kind], **others}.items()}
    config = small_config(
        tmp_path, attention__router="index", attention__router_loss="none", model__init_method_std=0.3,
        training__steps=1, optimizer__warmup_steps=0, optimizer__lr=1e-9, optimizer__min_lr=0.0, **index,
    )  # fmt: skip
    run_ranks(1, train_here, config)
    return Path(config.run.dir)


@pytest.mark.parametrize(
    "kind", [name if name == "by_key" else pytest.param(name, marks=pytest.mark.slow) for name in INDEXES]
)
def test_an_index_beside_means_and_bounds_on_any_layout(kind, tmp_path):
    run = trained(kind, tmp_path)
    (output,) = on_ranks(1, [[run, *ASKED, "--output", tmp_path / "one"]])
    assert "by the index): the chosen blocks hold" in output.replace("\n", " ") and "min-max" in output
    record = records(tmp_path / "one")[NAME]
    for layer in record["layers"]:
        chosen, *_, means, bounds = layer["choices"]
        assert (chosen["choice"], means["choice"]) == ("B=16 K=3 by the index", "B=16 K=3")
        assert bounds["choice"] == "B=16 K=3 top_k of min_max" and chosen["best"] == means["best"]
        assert (chosen["held"] == pytest.approx(means["held"], rel=1e-6)) == (kind == "copied")
    assert record["mass_held"] < record["mass_best"] > record["mass_min_max"] and record["mass_means"] > 0.2
    layouts = ["tensor=2,sequence=true", "context=2"] if kind == "by_key" else ["context=2"]
    on_ranks(2, [[run, *ASKED, "--parallel", sizes, "--output", tmp_path / sizes] for sizes in layouts])
    for sizes in layouts:
        same(records(tmp_path / sizes)[NAME], record)


def test_choices_that_an_index_does_not_make_are_made_without_it(tmp_path):
    """Of two models that differ in their index alone; a copied one chooses as own keys do."""
    texts = ("16:3", "16:3@0-2", "16:3:min_max", "16:3:share_mean", "16:3:recent")
    asked = ["--attention", "moba", "--samples", 2, *(part for text in texts for part in ("--losses-choice", text))]
    found = {}
    for kind in INDEXES:
        run = trained(kind, tmp_path / kind)
        (output,) = on_ranks(1, [[run, *asked]])
        assert "moba B=16 K=3 by the index; by own keys in layers 3" in output and "K=3 recent by position" in output
        names = ("B16_K3", "B16_K3_in_layers_0-2", "B16_K3_top_k_of_min_max", "B16_K3_top_k_shared_by_mean")
        found[kind] = [records(run)[f"step_1_{name}.json"] for name in (*names, "B16_K3_recent")]
    chosen = ["by the index; by own keys in layers 3", "by the index", "by own keys", "by own keys", "by position"]
    assert [record["chosen"] for record in found["by_key"]] == chosen
    same_loss = [
        one["loss"] == pytest.approx(other["loss"], rel=1e-9) for one, other in zip(*found.values(), strict=True)
    ]
    assert same_loss == [False, False, True, True, True]
    (output,) = on_ranks(1, [[tmp_path / "by_key/run", *ASKED, "--routing-choice", "16:3:min_max"]])
    assert "moba B=16 K=3 top_k of min_max: chosen by own keys" in output


def test_heads_that_choose_together_do_so_by_the_index(tmp_path):
    run = trained("copied", tmp_path, share_selection="mean")
    (output,) = on_ranks(1, [[run, *ASKED, "--losses-choice", "16:3:share_mean"]])
    assert "K=3 top_k shared by mean by the index; by own keys in layers 3" in output
    chosen = records(run)[NAME]["layers"][0]["choices"][0]
    assert chosen["choice"] == "B=16 K=3 top_k shared by mean by the index"
