"""What `auto` became, and what cannot run here, before anything starts."""

from pathlib import Path

import pytest
from small_run import small_config

from moba_megatron.config import ConfigError, load_config
from moba_megatron.model.schedule import checked_schedule
from moba_megatron.training.preflight import preflight, run_choices


def choices(folder, **changes):
    config = small_config(folder, **changes)
    return run_choices(config, checked_schedule(config))


def test_the_full_attention_backend_is_told_with_its_reason(tmp_path):
    def line(**changes):
        return next(line for line in choices(tmp_path, **changes) if line.startswith("attention.full_backend"))

    named = line(attention__full_backend="torch")
    assert named == "attention.full_backend = torch: torch (asked for by name)"
    assert line().startswith("attention.full_backend = auto: torch (auto: PyTorch's fused kernels; ")
    assert line(parallel__context=2) == "attention.full_backend = auto: the exchange (context parallelism)"


def test_blocks_that_cover_a_sequence_are_told(tmp_path):
    index = {"attention__router": "index", "attention__router_dim": 8}
    said = "attention: in 3 layers (over all stages) top_k blocks cover data.sequence_length = 128: "
    assert said + "MoBA is full attention there" in choices(tmp_path, attention__top_k=8)
    dense = choices(tmp_path, attention__top_k=8, **index, attention__router_loss="dense")
    assert said + "MoBA is full attention there" in dense
    kernels = said + "MoBA's kernels attend to all of them, and the index learns"
    assert kernels in choices(tmp_path, attention__top_k=8, **index)


def test_an_index_that_cannot_learn_is_refused(tmp_path):
    """Two past blocks of 16 tokens and a query behind them are the least: 33 tokens."""
    index = {"attention__router": "index", "attention__router_dim": 8, "attention__block_size": 16}
    only = {**index, "training__train_only": ["router"]}
    dense = {**index, "attention__router_loss": "dense"}

    def lines(**changes):
        return choices(tmp_path, **{"data__sequence_length": 33, **changes})

    for wrong in (
        {**index, "attention__top_k": 2}, {**index, "data__sequence_length": 32}, {**dense, "data__sequence_length": 32}
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="but no MoBA layer has two to compare: give one .* below half of data"):
            lines(**wrong)
    budgets = {n: {"top_k": [2, 3] if n == 2 else 2} for n in (1, 2, 3)}
    stays = "attention.router_loss = sparse: the index of layer 1, 3 stays as it is: no query there has two past blocks"
    assert any(line.startswith(stays) for line in lines(**only, attention__layers=budgets))
    stages = [{"until": 0.5, "kind": "full"}, {"until": 1.0}]
    with pytest.raises(ConfigError, match="train_only = .'router'.: nothing learns in stage 1 of attention.stages"):
        lines(**only, attention__stages=stages)
    for right in ({**index, "attention__stages": stages}, {**dense, "attention__top_k": 1}, only):
        assert not any("stays as it is" in line for line in lines(**right))
    assert lines(**index, attention__top_k=2, attention__router_loss="none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention__full_backend": "cudnn"}, "full_backend = cudnn: .* it takes .*, not torch.float32"),
        (
            {"attention__full_backend": "cudnn", "training__precision": "bf16"},
            "full_backend = cudnn: .* needs a CUDA device, not cpu",
        ),
        ({"attention__backend": "flash_moba"}, "attention.backend = flash_moba: .* it takes .*, not torch.float32"),
        (
            {"attention__backend": "flash_moba", "training__precision": "bf16"},
            "attention.backend = flash_moba: .* needs a CUDA device, not cpu",
        ),
        (
            {"attention__full_backend": "torch", "parallel__context": 2},
            "full_backend = torch with parallel.context = 2: .* use auto",
        ),
    ],
)
def test_backends_that_cannot_run_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        choices(tmp_path, **changes)


def test_a_start_says_where_its_weights_come_from(tmp_path):
    assert preflight(small_config(tmp_path), 1).weights == "weights: random, seed 1234"
    with pytest.raises(
        ConfigError, match=r"model.init_from = \?{3}: give the weights .* for instance model.init_from="
    ):
        preflight(small_config(tmp_path, model__init_from="???"), 1)


def test_a_recipe_leaves_the_weights_to_the_user():
    path = Path(__file__).parents[2] / "configs/continued_pretraining/llama3.1_8b/128k.yaml"
    config = load_config(path)
    assert config.model.init_from == "???" and config.model.hidden_size == 4096
    assert load_config(path, ["model.init_from=null"]).model.init_from is None
