"""TensorBoard and Weights & Biases, opened where and as a run's configuration says; for training and for evaluations.

Neither tool takes two writers at once to one run, and an evaluation may look at a run that still trains. So an
evaluation after training is a run of its own beside it: the folder `tensorboard/evaluate`, and in Weights & Biases a
run of the same group.
"""

from __future__ import annotations

import importlib.util
import netrc
import os
import secrets
import urllib.parse
from pathlib import Path
from typing import Any

from moba_megatron.config import LoggingConfig
from moba_megatron.runs.folder import RunFolder
from moba_megatron.temporary import let_wandb_in

# What the tools take as the axis, not as a curve.
AXES = ("step", "stage")


class Trackers:
    """The trackers that a run has switched on; none is fine.

    Args:
        folder: the run folder.
        settings: the run's configuration, as it is shown beside the curves.
        purge_step: TensorBoard forgets its curves from this step on (a resumed run writes them again).
        evaluation: whether this is an evaluation beside a run, see the module.
    """

    def __init__(
        self,
        folder: RunFolder,
        logging: LoggingConfig,
        settings: dict[str, Any],
        *,
        purge_step: int | None = None,
        evaluation: bool = False,
    ):
        self.tensorboard = self.wandb = None
        if logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            events = folder.tensorboard / ("evaluate" if evaluation else "")
            self.tensorboard = SummaryWriter(str(events), purge_step=purge_step)
        if logging.wandb != "off":
            self.wandb = _open_wandb(folder, logging, settings, "evaluate" if evaluation else "")

    def track(self, values: dict[str, Any], prefix: str, step: int) -> None:
        """Send the numbers among these values as `prefix/name`, at a training step."""
        curves = {
            f"{prefix}/{name}": value
            for name, value in values.items()
            if isinstance(value, int | float) and name not in AXES
        }
        if self.tensorboard:
            for name, value in curves.items():
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log({**curves, "step": step})

    def close(self) -> None:
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def check_trackers(logging: LoggingConfig) -> None:
    """Raise ValueError where Weights & Biases is on and not installed, or has no key to go online with, before any work
    is lost to that."""
    if logging.wandb != "off":
        let_wandb_in()
    if logging.wandb != "off" and importlib.util.find_spec("wandb") is None:
        raise ValueError(f"logging.wandb = {logging.wandb}: wandb is not installed (pip install wandb)")
    if logging.wandb == "online" and not _has_wandb_key():
        raise ValueError(
            "logging.wandb = online, but there is no API key: run `wandb login`, set WANDB_API_KEY, or take offline"
        )


def _has_wandb_key() -> bool:
    """Whether wandb finds a key without asking: in the environment, or where `wandb login` has put it."""
    if any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    host = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path.home() / name for name in (".netrc", "_netrc")]:
        try:
            if path.is_file() and netrc.netrc(path).authenticators(host):
                return True
        except (netrc.NetrcParseError, OSError):
            continue
    return False


def _open_wandb(folder: RunFolder, logging: LoggingConfig, settings: dict[str, Any], suffix: str) -> Any:
    let_wandb_in()
    import wandb

    identity = folder.wandb_id
    if not identity.is_file():
        identity.write_text(secrets.token_hex(4), encoding="utf-8")
    names = [folder.path.resolve().name, identity.read_text(encoding="utf-8")]
    name, number = (f"{name}-{suffix}" if suffix else name for name in names)
    run = wandb.init(
        project=logging.wandb_project,
        group=folder.path.resolve().name,
        name=name,
        id=number,
        resume="allow",
        dir=str(folder.path),
        mode=logging.wandb,
        config=settings,
        settings=wandb.Settings(silent=bool(suffix)),
    )
    run.define_metric("*", step_metric="step")
    return run
