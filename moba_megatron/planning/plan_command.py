"""`moba-megatron plan`: estimates for a configuration on GPUs that this machine need not have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moba_megatron.errors import user_errors


@user_errors()
def plan_command(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG|HF_DIR",
            help="YAML configuration, as for train.py, or a Hugging Face folder (config.json is enough).",
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.path=value, for instance parallel.tensor=8.")
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(min=1, help="Total number of GPUs. Default: the fewest whole nodes that hold the layout."),
    ] = None,
    length: Annotated[
        str | None,
        typer.Option(
            help="With a Hugging Face folder: tokens of a sample (128K, 1M) in continued pretraining with MoBA."
        ),
    ] = None,
    gpu: Annotated[str, typer.Option(help="a100 (80 GB), h100, h200 or b200.")] = "h100",
    per_node: Annotated[int, typer.Option(min=1, help="GPUs in a node, connected by fast links.")] = 8,
    price_per_hour: Annotated[float | None, typer.Option(min=0, help="Price of one GPU hour, in any currency.")] = None,
    layouts: Annotated[int, typer.Option(min=0, help="Number of layouts to suggest.")] = 5,
    output: Annotated[Path | None, typer.Option("--json", help="Write all results into this file as well.")] = None,
) -> None:
    """Estimate memory, communication, time and cost of a configuration on GPUs, and suggest layouts.

        moba-megatron plan configs/continued_pretraining/llama3.1_8b/128k.yaml

        moba-megatron plan models/Llama-3.1-8B --length 128K --gpus 8

    It measures nothing and needs no GPU. The exit code is 1 if the configuration's own layout does not fit these GPUs,
    and 2 for mistakes.
    """
    from moba_megatron.planning.plan_cluster import plan_on
    from moba_megatron.planning.plan_target import planned

    target = planned(config, overrides, length, gpu=gpu, count=gpus, per_node=per_node)
    if not plan_on(target, layouts, price_per_hour, output):
        raise typer.Exit(1)
