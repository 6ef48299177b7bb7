"""The installed command `moba-megatron`: a thin door. Each command lives in its part of the package and is imported
only when it is called."""

from __future__ import annotations

from importlib import import_module

import typer
from typer.core import TyperCommand, TyperGroup

COMMANDS = {
    "prepare": "moba_megatron.data.command:prepare_command",
    "prepare merge": "moba_megatron.data.subcommands:merge_command",
    "prepare inspect": "moba_megatron.data.subcommands:inspect_command",
    "prepare blend": "moba_megatron.data.subcommands:blend_command",
    "evaluate": "moba_megatron.evaluation.command:evaluate_command",
    "report": "moba_megatron.evaluation.report:report_command",
    "generate": "moba_megatron.generation.command:generate_command",
    "import-hf": "moba_megatron.convert.command:import_command",
    "export-hf": "moba_megatron.convert.command:export_command",
    "bench": "moba_megatron.planning.command:bench_command",
    "scaling": "moba_megatron.scaling.command:scaling_app",
    "plan": "moba_megatron.planning.plan_command:plan_command",
    "doctor": "moba_megatron.doctor:doctor_command",
}


class LazyCommands(TyperGroup):
    """Knows the commands by name and imports the one that is asked for."""

    def list_commands(self, ctx: typer.Context) -> list[str]:
        return list(COMMANDS)

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> tuple[str | None, TyperCommand | None, list[str]]:
        """Two words name a command where there is one of that name."""
        pair = " ".join(args[:2])
        return super().resolve_command(ctx, [pair, *args[2:]] if pair in COMMANDS else args)

    def get_command(self, ctx: typer.Context, cmd_name: str) -> TyperCommand | TyperGroup | None:
        if cmd_name not in COMMANDS:
            return None
        if not cmd_name.startswith("prepare"):
            # Imports torch, which takes as long as preparing a hundred megabytes, and which that does not need.
            from moba_megatron.platform.quiet import silence_missing_libraries
            from moba_megatron.platform.waiting import wait_briefly

            silence_missing_libraries()
            wait_briefly()
        module, function = COMMANDS[cmd_name].split(":")
        found = getattr(import_module(module), function)
        if isinstance(found, typer.Typer):
            group = typer.main.get_group(found)
            group.name = cmd_name  # else `--help` lists it without one
            return group
        single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        single.command(cmd_name)(found)
        return typer.main.get_command(single)


app = typer.Typer(cls=LazyCommands, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """MoBA language models on stock megatron-core: data, evaluation, generation and measurements.

    Training itself is `python train.py CONFIG.yaml`.
    """
