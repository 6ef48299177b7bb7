"""The installed command `moba-megatron`.

Each command is in its part of the package. Its module has the signature and the help, and imports the rest (torch,
megatron-core, transformers) only when the command is called. So `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable

import typer
from typer.core import TyperCommand, TyperGroup

from moba_megatron.before_torch import accept_any_text, silence_missing_libraries, wait_briefly
from moba_megatron.benchmark.bench_command import bench_command
from moba_megatron.checkpoint_command import checkpoint_app
from moba_megatron.convert.hf_commands import export_command, import_command, import_megatron_command
from moba_megatron.corpus.prepare_command import blend_command, inspect_command, merge_command, prepare_command
from moba_megatron.doctor import doctor_command
from moba_megatron.evaluation.evaluate_command import evaluate_command
from moba_megatron.evaluation.report.report_command import report_command
from moba_megatron.generation.generate_command import generate_command
from moba_megatron.planning.plan_command import plan_command
from moba_megatron.scaling.scaling_command import scaling_app
from moba_megatron.temporary import leave_wandb_out

COMMANDS: dict[str, Callable[..., None] | typer.Typer] = {
    "prepare": prepare_command,
    "prepare merge": merge_command,
    "prepare inspect": inspect_command,
    "prepare blend": blend_command,
    "evaluate": evaluate_command,
    "report": report_command,
    "generate": generate_command,
    "import-hf": import_command,
    "import-megatron": import_megatron_command,
    "export-hf": export_command,
    "checkpoint": checkpoint_app,
    "bench": bench_command,
    "scaling": scaling_app,
    "plan": plan_command,
    "doctor": doctor_command,
}


class Commands(TyperGroup):
    """All commands, some of two words."""

    def list_commands(self, ctx: typer.Context) -> list[str]:
        return list(COMMANDS)

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> tuple[str | None, TyperCommand | None, list[str]]:
        """Two words name a command if one has that name."""
        pair = " ".join(args[:2])
        return super().resolve_command(ctx, [pair, *args[2:]] if pair in COMMANDS else args)

    def get_command(self, ctx: typer.Context, cmd_name: str) -> TyperCommand | TyperGroup | None:
        if cmd_name not in COMMANDS:
            return None
        wait_briefly()
        accept_any_text()
        silence_missing_libraries()
        leave_wandb_out()
        found = COMMANDS[cmd_name]
        if isinstance(found, typer.Typer):
            group = typer.main.get_group(found)
            group.name = cmd_name  # else `--help` lists it without one
            return group
        single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        single.command(cmd_name)(found)
        return typer.main.get_command(single)


app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """MoBA language models on stock megatron-core: data, evaluation, generation and measurements.

    Training itself is `python train.py CONFIG.yaml`.
    """


if __name__ == "__main__":
    app()
