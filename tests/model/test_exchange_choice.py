"""What `parallel.exchange` means for a configuration: names, levels, reasons, and refusals before any process."""

from __future__ import annotations

import typing
from dataclasses import replace

import pytest
from model_examples import tiny

from moba_megatron.config import ConfigError, Exchange
from moba_megatron.model.builder import transformer_config
from moba_megatron.model.exchange_choice import rank_sizes, resolve_exchange
from moba_megatron.model.schedule import FULL, LayerAttention
from moba_megatron.parallel.exchange_kind import RankSizes
from moba_megatron.parallel.exchanges import EXCHANGES, choose_exchange
from moba_megatron.parallel.ring_load import random_choice_factor

HYBRID = {"block_size": 8, "top_k": 2, "last_n_full": 1}


def resolve(context: int, exchange="auto", attention=HYBRID, **parallel):
    parallel = {"context": context, "exchange": exchange, **parallel}
    return resolve_exchange(tiny(parallel=parallel, attention=dict(attention)))


def test_the_words_of_the_configuration_are_those_of_the_exchanges():
    assert typing.get_args(Exchange) == ("auto", *EXCHANGES)


def test_the_sizes_are_those_of_one_rank():
    config = tiny(parallel={"context": 4, "tensor": 2}, training={"precision": "bf16", "micro_batch_size": 2})
    assert rank_sizes(config, LayerAttention("moba", 8, 2)) == RankSizes(32, 2, 1, 8, 2, 8, 2)
    assert rank_sizes(config, FULL) == RankSizes(32, 2, 1, 8, 2, None, None)


def test_one_rank_exchanges_nothing():
    choice = resolve(1, "dispatch")
    assert (choice.moba, choice.full, choice.levels, choice.lines) == (None, None, None, ())


@pytest.mark.parametrize(
    ("context", "exchange", "expected"),
    [
        (2, "auto", ("a2a", "a2a", None)),
        (2, "dispatch", ("dispatch", "a2a", None)),
        (4, "dispatch", ("dispatch", "p2p", None)),
        (4, "a2a+p2p", ("a2a+p2p", "a2a+p2p", (2, 2))),
        (4, {"moba": "all_gather", "full": "a2a+p2p"}, ("all_gather", "a2a+p2p", (2, 2))),
    ],
)
def test_each_kind_has_its_exchange(context, exchange, expected):
    choice = resolve(context, exchange)
    assert (choice.moba, choice.full, choice.levels) == expected
    assert [line.split(" =")[0] for line in choice.lines] == ["parallel.exchange.moba", "parallel.exchange.full"]


def test_auto_says_why_in_bytes():
    moba, full = resolve(4).lines
    assert moba.startswith("parallel.exchange.moba = auto: ") and "MiB" in moba
    assert full.startswith("parallel.exchange.full = auto: ") and "MiB" in full
    by_name = resolve(4, "a2a+p2p").lines[0]
    assert by_name.startswith("parallel.exchange.moba = a2a+p2p: a2a+p2p [2, 2] (asked for by name; ")
    assert "at most" in resolve(4, "dispatch").lines[0]


def test_auto_says_how_much_a_ring_waits():
    sizes = RankSizes(32768, 32, 8, 128, 2, 4096, 12)
    choice, factor = choose_exchange(sizes, 32), random_choice_factor(4, 256, 12)
    assert (choice.name, choice.levels) == ("a2a+p2p", (8, 4)) and factor > 1.1
    assert f"its ring waits for the busiest rank of each step, {factor:.2g} x the attention" in choice.reason
    full = choose_exchange(replace(sizes, block_size=None, top_k=None), 32)
    assert full.levels == (8, 4) and "busiest" not in full.reason


def test_a_kind_that_no_layer_is_has_no_exchange():
    assert resolve(2, attention={"block_size": 8, "top_k": 2}).full is None
    later = {"stages": [{"until": 0.5}, {"until": 1.0, "kind": "full"}]}
    assert resolve(2, attention={"block_size": 8, "top_k": 2, **later}).full == "a2a"
    assert resolve(2, attention={"kind": "full"}).moba is None


@pytest.mark.parametrize(
    ("context", "exchange", "more", "expected"),
    [
        (
            4,
            "a2a",
            {},
            "parallel.exchange.moba = a2a: exchange a2a: 4 context-parallel ranks do not divide 4 query heads",
        ),
        (
            2,
            {"full": "a2a", "moba": "p2p"},
            {"tensor": 2},
            "parallel.exchange.full = a2a: exchange a2a: 2 context-para",
        ),
        (8, "a2a+p2p", {"hierarchical_context": [4, 2]}, "4 ranks do not divide 4 query heads and 2 key heads"),
        (2, "a2a+p2p", {}, "is p2p"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(context, exchange, more, expected):
    with pytest.raises(ConfigError) as error:
        resolve(context, exchange, **more)
    assert expected in str(error.value)


def test_the_reference_backend_needs_whole_heads():
    reference = {**HYBRID, "backend": "reference"}
    assert resolve(2, attention=reference).moba == "a2a"
    assert resolve(2, {"moba": "a2a", "full": "p2p"}, attention=reference).full == "p2p"
    with pytest.raises(ConfigError, match="the reference backend runs under context parallelism with a2a only"):
        resolve(2, "p2p", attention=reference)
    with pytest.raises(ConfigError, match="4 context-parallel ranks do not divide"):
        resolve(4, attention=reference)


def test_megatron_core_hears_of_full_layers_only_and_in_one_word():
    def settings(context: int, exchange: str, packed: bool = True, **parallel):
        parallel = {"context": context, "exchange": exchange, **parallel}
        data = {"cross_document_attention": not packed}
        return transformer_config(tiny(parallel=parallel, attention=dict(HYBRID), data=data), device_type="cpu")

    assert settings(2, "dispatch", packed=False).cp_comm_type == "a2a"
    assert settings(4, "a2a+p2p", packed=False).cp_comm_type == "a2a+p2p"
    assert settings(1, "a2a", packed=False).cp_comm_type == "p2p"
    assert settings(2, "a2a").cp_comm_type == "p2p"
    assert not settings(2, "auto").variable_seq_lengths
    assert settings(2, "auto", pipeline=2).variable_seq_lengths


def test_an_uneven_pipeline_in_megatron_cores_words():
    parallel = {"pipeline": 2, "virtual_pipeline": 2, "pipeline_layers": [2, 1, 1, 0]}
    transformer = transformer_config(tiny(model={"num_layers": 4}, parallel=parallel), device_type="cpu")
    layout = [
        [[layer.name for layer in chunk] for chunk in rank]
        for rank in transformer.pipeline_model_parallel_layout.layout
    ]
    assert layout == [[["embedding", "decoder", "decoder"], ["decoder"]], [["decoder"], ["loss"]]]
