"""Megatron-LM's training scripts on a machine without CUDA: to try a command before a GPU runs it.

    python -m moba_megatron.platform.megatron_lm path/to/Megatron-LM/pretrain_gpt.py ARGS
    torchrun --nproc-per-node 2 -m moba_megatron.platform.megatron_lm path/to/Megatron-LM/pretrain_gpt.py ARGS

The script is run as it is, with the `megatron` of its own folder. `platform.apply` makes megatron-core run;
`_stand_ins` is what `megatron.training` reaches for besides. It takes local layers and `--distributed-backend gloo`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import runpy
import sys
import sysconfig
from pathlib import Path

# Before torch is imported.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Functions decorated for compilation would be compiled for the CPU at each start.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
# A world of one without torchrun.
os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
os.environ.setdefault("MASTER_PORT", "0")

import torch  # noqa: E402

from moba_megatron.platform.differences import Replacement, apply  # noqa: E402


def main(arguments: list[str]) -> None:
    """Run a script of Megatron-LM: its path, then its arguments."""
    script = Path(arguments[0]).resolve() if arguments else Path()
    if not script.is_file():
        sys.exit("give the path of a script of Megatron-LM, such as pretrain_gpt.py, and its arguments")
    sys.argv = [str(script), *arguments[1:]]
    # As Python does for a script; so `megatron` is first looked for there.
    sys.path.insert(0, str(script.parent))
    apply("cpu")
    for owner, attribute, value in _stand_ins():
        setattr(owner, attribute, value)
    if int(os.environ.get("RANK", "0")) > 0:
        # All ranks need them; rank 0 loads them where Megatron-LM would compile them.
        _load_dataset_helpers()
    runpy.run_path(str(script), run_name="__main__")


def _stand_ins() -> list[Replacement]:
    from megatron.core.datasets import utils
    from megatron.training import arguments, initialize, training

    stream = torch.cuda.current_stream()
    # Up to 0.16 it compiles its fused softmax by nvcc.
    kernels = [(initialize.fused_kernels, "load", lambda args: None)] if hasattr(initialize, "fused_kernels") else []
    return kernels + [
        # It asserts that there is CUDA; this is its own switch for that.
        (training, "initialize_megatron", functools.partial(training.initialize_megatron, allow_no_cuda=True)),
        # Without a device it starts no model-parallel groups.
        (torch.cuda, "device_count", lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))),
        (torch.cuda, "set_device", lambda device: None),
        # Asks for the properties of a device; from 10 on no environment variable has to be set for several ranks.
        (arguments, "get_device_arch_version", lambda: 10),
        # Compiles in Megatron-LM's folder; the installed package has them compiled.
        (utils, "compile_helpers", _load_dataset_helpers),
        # Fused functions are warmed up with random tensors of device "cuda".
        (torch, "rand", _without_cuda(torch.rand)),
        # The data parallel wrapper is built on a stream of its own; a CPU has one order of work.
        (torch.cuda, "Stream", lambda *args, **kwargs: stream),
        (torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
    ]


def _without_cuda(factory):
    @functools.wraps(factory)
    def wrapper(*args, device=None, **kwargs):
        on_cuda = device is not None and torch.device(device).type == "cuda"
        return factory(*args, device=None if on_cuda else device, **kwargs)

    return wrapper


def _load_dataset_helpers() -> None:
    """The compiled helpers of the installed megatron-core, under the name that Megatron-LM's own has."""
    name = "megatron.core.datasets.helpers_cpp"
    if name in sys.modules:
        return
    ending = sysconfig.get_config_var("EXT_SUFFIX")
    found = [file for folder in sys.path for file in Path(folder).glob(f"{name.replace('.', '/')}{ending}")]
    if not found:
        sys.exit("no compiled megatron.core.datasets.helpers_cpp on sys.path: install megatron-core")
    spec = importlib.util.spec_from_file_location(name, found[0])
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


if __name__ == "__main__":
    main(sys.argv[1:])
