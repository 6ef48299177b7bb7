"""The models of `huggingface_models`, saved once."""

from __future__ import annotations

import pytest
from huggingface_models import MODELS, Saved, saved_model


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    """Every kind of model by name; tests must not change the folders."""
    folder = tmp_path_factory.mktemp("huggingface")
    return {name: saved_model(folder / name, name) for name in MODELS}
