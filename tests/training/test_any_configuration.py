"""Any configuration is refused with a message that names a key, or trains two steps."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from distributed import run_ranks
from random_settings import changed_values, keys
from small_run import small_values, train_here

from moba_megatron.config import Config, ConfigError, load_config
from moba_megatron.errors import explained
from moba_megatron.training.preflight import preflight

NAMED = re.compile("|".join(sorted({re.escape(name) for key, _ in keys() for name in (key, key.split(".")[1])})))


def drawn(seed: int, folder: Path) -> tuple[dict[str, Any], list[str]]:
    values = small_values(folder, training__steps=2, optimizer__warmup_steps=0)
    return values, changed_values(values, random.Random(seed))


def accepted(values: dict[str, Any], folder: Path) -> Config | None:
    """The configuration, if a start takes it; None if it is refused as it should be."""
    path = folder / "c.yaml"
    path.write_bytes(yaml.safe_dump(values, allow_unicode=True).encode("utf-8", "surrogatepass"))
    try:
        config = load_config(path)
        preflight(config, 1)
    except ConfigError as error:
        assert NAMED.search(str(error)) or "c.yaml" in str(error), f"{error} names no key"
        return None
    except Exception as error:
        assert explained(error) is not None, f"{values}: {type(error)} {error}"
        return None
    return config


def trained(config: Config, folder: Path) -> str | None:
    """Train in a process of its own; what went wrong that no message explains, or None."""

    def attempt() -> str | None:
        try:
            train_here(config)
        except Exception as error:
            return None if explained(error) is not None else f"{type(error).__name__}: {error}"
        return None

    (wrong,) = run_ranks(1, attempt)
    shutil.rmtree(folder / "run", ignore_errors=True)
    return wrong


def look(seeds: range, folder: Path, trainings: int) -> tuple[int, int]:
    """Of these configurations, how many were refused and how many trained, at most `trainings`."""
    refused = done = 0
    for seed in seeds:
        values, changed = drawn(seed, folder)
        config = accepted(values, folder)
        if config is None:
            refused += 1
        elif done < trainings:
            done += 1
            wrong = trained(config, folder)
            assert wrong is None, f"seed {seed}, {changed}: {wrong}\n{values}"
    return refused, done


def test_drawn_configurations_are_refused_by_name_or_train(tmp_path: Path):
    refused, done = look(range(400), tmp_path, trainings=6)
    assert refused > 100 and done == 6


@pytest.mark.slow
def test_many_drawn_configurations_are_refused_by_name_or_train(tmp_path: Path):
    refused, done = look(range(1000, 4000), tmp_path, trainings=150)
    assert refused > 500 and done == 150
