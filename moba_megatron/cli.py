"""The installed command `moba-megatron`: a thin door. Each command lives in its part of the package and is imported
only when it is called."""

from __future__ import annotations

from importlib import import_module

import typer
from typer.core import TyperCommand, TyperGroup

from moba_megatron.platform.quiet import silence_missing_libraries

COMMANDS = {
    "prepare": "moba_megatron.data.command:prepare_command",
    "evaluate": "moba_megatron.evaluation.command:evaluate_command",
    "generate": "moba_megatron.generation.command:generate_command",
    "import-hf": "moba_megatron.convert.command:import_command",
    "export-hf": "moba_megatron.convert.command:export_command",
    "bench": "moba_megatron.planning.command:bench_command",
    "doctor": "moba_megatron.doctor:doctor_command",
}


class LazyCommands(TyperGroup):
    """Knows the commands by name and imports the one that is asked for."""

    def list_commands(self, ctx: typer.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: typer.Context, cmd_name: str) -> TyperCommand | None:
        if cmd_name not in COMMANDS:
            return None
        silence_missing_libraries()
        module, function = COMMANDS[cmd_name].split(":")
        single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        single.command(cmd_name)(getattr(import_module(module), function))
        return typer.main.get_command(single)


app = typer.Typer(cls=LazyCommands, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """MoBA language models on stock megatron-core: data, evaluation, generation and measurements.

    Training itself is `python train.py CONFIG.yaml`.
    """
