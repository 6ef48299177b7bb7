"""What `auto` became, and what cannot run here, before anything starts."""

import pytest
from small_run import small_config

from moba_megatron.config import ConfigError
from moba_megatron.model.schedule import checked_schedule
from moba_megatron.training.preflight import run_choices


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
