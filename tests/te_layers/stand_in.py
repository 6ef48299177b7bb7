"""A stand-in for the compiled part of Transformer Engine, whose own Python then builds, names, saves and loads layers;
they are never called. A plugin of pytest, in place before megatron-core is imported: `tests/te.sh` names it."""

from __future__ import annotations

import enum
import importlib.util
import sys
import types
import warnings

import torch


class _Anything:
    """Whatever the Python part asks of the compiled one while it is imported and layers are built: names, members of
    enumerations, base classes, functions whose results nobody looks at."""

    def __init__(self, name: str, number: int):
        self._name, self._number = name, number

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        found = _Anything(f"{self._name}.{name}", self._number + len(vars(self)))
        setattr(self, name, found)
        return found

    def __call__(self, *args, **kwargs):
        return _Anything(f"{self._name}()", self._number)

    def __int__(self) -> int:
        return self._number

    __index__ = __int__

    def __iter__(self):
        return iter(())

    def __or__(self, other):
        return self

    __ror__ = __or__

    def __ge__(self, other) -> bool:
        return True

    def __lt__(self, other) -> bool:
        return False

    def __mro_entries__(self, bases):
        return (object,)


class _CompiledPart(types.ModuleType):
    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        found = _Anything(name, len(vars(self)))
        setattr(self, name, found)
        return found


def _install() -> None:
    import transformer_engine.common as common

    warnings.filterwarnings("ignore", module="transformer_engine")
    module = _CompiledPart("transformer_engine_torch")
    module.__file__ = module.__version__ = "stand-in"
    names = "kByte kInt32 kFloat32 kFloat16 kBFloat16 kFloat8E4M3 kFloat8E5M2 kFloat4E2M1".split()
    module.DType = enum.IntEnum("DType", {name: number for number, name in enumerate(names)})
    backends = {"NVTE_No_Backend": -1, "NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2}
    module.NVTE_Fused_Attn_Backend = enum.IntEnum("NVTE_Fused_Attn_Backend", backends)
    common.load_framework_extension = lambda name: None
    sys.modules["transformer_engine_torch"] = module

    class H100:
        major, minor, multi_processor_count, total_memory, name = 9, 0, 132, 80 << 30, "H100"

    torch.cuda.get_device_capability = lambda *args, **kwargs: (9, 0)
    torch.cuda.get_device_properties = lambda *args, **kwargs: H100


if importlib.util.find_spec("transformer_engine_torch") is None:
    _install()
