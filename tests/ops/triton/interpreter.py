"""Triton's interpreter, made to see what a GPU would suffer from in silence.

The interpreter runs the programs of a launch one after the other, in order, on memory that mostly holds zeros: two
programs that write one place, a read of what nobody wrote, or an address beside a tensor show nowhere. `Watch` notes
the addresses that each program loads, stores and adds to, and finds

- two programs of which one stores what the other loads, stores or adds to: their order is open on a GPU;
- within a program, a store and a load, store or atomic of one place without a barrier between them: threads may
  differ, but for a store by the very lane that has loaded the place, which needs its value;
- two lanes of one store with different values for one place;
- addresses outside of every tensor of the launch;
- float atomics: their sums depend on their order.

Programs can run in another order (`order`), and memory that is handed out uninitialised can be poisoned.

Besides, the interpreter cuts fp32 off to bf16 where hardware rounds to nearest; `rounding_to_nearest` fixes that.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1: this is about Triton's interpreter"

import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

Order = str | int
"""Of a launch's programs: `natural`, `reverse`, or the seed of a shuffle."""


@dataclass
class _Access:
    """One load, store or atomic of one program: where it stands among barriers, and its addresses."""

    program: int
    epoch: int
    addresses: np.ndarray
    lanes: np.ndarray
    shape: tuple[int, ...]


@dataclass
class _Launch:
    kernel: str
    ranges: list[tuple[int, int]]
    program: int = 0
    epoch: int = 0
    loads: list[_Access] = field(default_factory=list)
    stores: list[_Access] = field(default_factory=list)
    atomics: list[_Access] = field(default_factory=list)


@dataclass
class Watch:
    """What was seen while it was on.

    Attributes:
        findings: one line for each kind of fault of a kernel.
        launches: how many there were of each kernel.
        accesses: addresses seen.
    """

    order: Order = "natural"
    findings: set[str] = field(default_factory=set)
    launches: dict[str, int] = field(default_factory=dict)
    accesses: int = 0
    _launch: _Launch | None = None

    def run(self, executor, args_dev, kwargs) -> None:
        """What the interpreter does with a launch on CPU tensors, in this order, watched."""
        function = executor.fn
        kwargs = {name: value for name, value in kwargs.items() if name in inspect.getfullargspec(function).args}
        tensors = [value for value in (*args_dev, *kwargs.values()) if isinstance(value, torch.Tensor)]
        name = function.__name__
        launch = _Launch(name, [_extent(tensor) for tensor in tensors])
        self.launches[name] = self.launches.get(name, 0) + 1
        scope = interpreter._patch_lang(function)
        try:
            args = inspect.getcallargs(function, *args_dev, **kwargs)
            args = {
                name: value if name in executor.constexprs else interpreter._implicit_cvt(value)
                for name, value in args.items()
            }
            grid = executor.grid(args) if callable(executor.grid) else executor.grid
            grid = (*grid, *[1] * (3 - len(grid)))
            interpreter.interpreter_builder.set_grid_dim(*grid)
            self._launch = launch
            for number, place in self._in_order(list(np.ndindex(*grid))):
                launch.program, launch.epoch = number, 0
                interpreter.interpreter_builder.set_grid_idx(*place)
                function(**args)
        finally:
            self._launch = None
            scope.restore()
        self._compare_programs(launch)

    def _in_order(self, places: list[tuple[int, ...]]) -> list[tuple[int, tuple[int, ...]]]:
        numbered = list(enumerate(places))
        if self.order == "reverse":
            return numbered[::-1]
        if self.order != "natural":
            random.Random(self.order).shuffle(numbered)
        return numbered

    def load(self, pointers, mask) -> None:
        if (launch := self._launch) is None:
            return
        access = _access(launch, pointers, mask)
        self._check_bounds(launch, "loads", access, pointers)
        self._meets(launch, launch.stores, access, "loads what it has stored")
        self._meets(launch, launch.atomics, access, "loads what it has added to")
        launch.loads.append(access)

    def store(self, pointers, value, mask) -> None:
        if (launch := self._launch) is None:
            return
        access = _access(launch, pointers, mask)
        self._check_bounds(launch, "stores", access, pointers)
        values = np.broadcast_to(value.data, access.shape).reshape(-1)[access.lanes]
        order = np.argsort(access.addresses, kind="stable")
        same = np.diff(access.addresses[order]) == 0
        one, other = values[order][1:], values[order][:-1]
        if (same & (one != other) & ~((one != one) & (other != other))).any():
            self._find(launch, "two lanes store different values at one place")
        self._meets(launch, launch.stores, access, "stores twice at one place")
        self._meets(launch, launch.atomics, access, "stores what it has added to")
        self._meets(launch, launch.loads, access, "stores what another lane has loaded", but_for_own_lanes=True)
        launch.stores.append(access)

    def atomic(self, pointers, value, mask) -> None:
        if (launch := self._launch) is None:
            return
        access = _access(launch, pointers, mask)
        self._check_bounds(launch, "adds", access, pointers)
        if not np.issubdtype(value.data.dtype, np.integer):
            self._find(launch, "float atomics")
        self._meets(launch, launch.stores, access, "adds to what it has stored")
        self._meets(launch, launch.loads, access, "adds to what it has loaded")
        launch.atomics.append(access)

    def barrier(self) -> None:
        if self._launch is not None:
            self._launch.epoch += 1

    def _find(self, launch: _Launch, what: str) -> None:
        self.findings.add(f"{launch.kernel}: {what}")

    def _check_bounds(self, launch: _Launch, verb: str, access: _Access, pointers) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        inside = np.zeros(access.addresses.shape, bool)
        for first, end in launch.ranges:
            inside |= (access.addresses >= first) & (access.addresses + size <= end)
        if not inside.all():
            self._find(launch, f"{verb} outside of its tensors")

    def _meets(
        self, launch: _Launch, before: list[_Access], now: _Access, what: str, *, but_for_own_lanes: bool = False
    ) -> None:
        """Whether this program touched one of these addresses since its last barrier."""
        for access in reversed(before):
            if (access.program, access.epoch) != (now.program, now.epoch):
                break
            found, first, second = np.intersect1d(access.addresses, now.addresses, return_indices=True)
            own = but_for_own_lanes and access.shape == now.shape
            if found.size and not (own and (access.lanes[first] == now.lanes[second]).all()):
                self._find(launch, f"{what}, without a barrier")
                break

    def _compare_programs(self, launch: _Launch) -> None:
        stored, by = _joined(launch.stores)
        loaded, loaded_by = _joined(launch.loads)
        added, added_by = _joined(launch.atomics)
        self.accesses += stored.size + loaded.size + added.size
        order = np.lexsort((by, stored))
        stored, by = stored[order], by[order]
        if ((stored[1:] == stored[:-1]) & (by[1:] != by[:-1])).any():
            self._find(launch, "two programs store at one place")
        elif _by_others(loaded, loaded_by, stored, by):
            self._find(launch, "one program loads what another stores")
        if _by_others(stored, by, added, added_by) or _by_others(loaded, loaded_by, added, added_by):
            self._find(launch, "programs add to what others load or store")


def _access(launch: _Launch, pointers, mask) -> _Access:
    shape = np.broadcast_shapes(pointers.data.shape, mask.data.shape)
    lanes = np.flatnonzero(np.broadcast_to(mask.data.astype(bool), shape))
    addresses = np.broadcast_to(pointers.data, shape).reshape(-1)[lanes].astype(np.int64)
    return _Access(launch.program, launch.epoch, addresses, lanes, shape)


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    if tensor.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _joined(accesses: list[_Access]) -> tuple[np.ndarray, np.ndarray]:
    """All addresses, and the program of each."""
    none = np.zeros(0, np.int64)
    addresses = np.concatenate([none, *(access.addresses for access in accesses)])
    programs = np.concatenate([none, *(np.full(access.addresses.size, access.program) for access in accesses)])
    return addresses, programs


def _by_others(places: np.ndarray, by: np.ndarray, touched: np.ndarray, touched_by: np.ndarray) -> bool:
    """Whether a program touches one of these places that another one touches as well."""
    if not touched.size or not places.size:
        return False
    order = np.lexsort((touched_by, touched))
    touched, touched_by = touched[order], touched_by[order]
    first = np.searchsorted(touched, places).clip(max=touched.size - 1)
    last = (np.searchsorted(touched, places, side="right") - 1).clip(min=0)
    met = touched[first] == places
    return bool((met & ((touched_by[first] != by) | (touched_by[last] != by))).any())


@contextlib.contextmanager
def watching(order: Order = "natural") -> Iterator[Watch]:
    """Watch every launch in the `with` block."""
    watch, builder = Watch(order), type(interpreter.interpreter_builder)
    stock = {
        name: getattr(builder, name)
        for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_barrier")
    }

    def load(self, pointers, mask, *rest):
        watch.load(pointers, mask)
        return stock["create_masked_load"](self, pointers, mask, *rest)

    def store(self, pointers, value, mask, *rest):
        watch.store(pointers, value, mask)
        return stock["create_masked_store"](self, pointers, value, mask, *rest)

    def atomic(self, operation, pointers, value, mask, *rest):
        watch.atomic(pointers, value, mask)
        return stock["create_atomic_rmw"](self, operation, pointers, value, mask, *rest)

    def barrier(self, *rest):
        watch.barrier()
        return stock["create_barrier"](self, *rest)

    mine = dict(zip(stock, (load, store, atomic, barrier), strict=True))
    with _replaced(builder, mine), _replaced(interpreter.GridExecutor, {"__call__": _run_by(watch)}):
        yield watch


def _run_by(watch: Watch):
    return lambda executor, *args, **kwargs: watch.run(executor, args, kwargs)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory handed out uninitialised holds NaN, or an integer that is not an index of anything here."""

    def poisoning(factory):
        def make(*args, **kwargs):
            tensor = factory(*args, **kwargs)
            if tensor.device.type == "cpu" and tensor.is_floating_point():
                tensor.fill_(torch.nan)
            elif tensor.device.type == "cpu" and tensor.dtype in (torch.int32, torch.int64):
                tensor.fill_(2**30 + 12345)
            return tensor

        return make

    new_empty = {"new_empty": poisoning(torch.Tensor.new_empty)}
    factories = {name: poisoning(getattr(torch, name)) for name in ("empty", "empty_like")}
    with _replaced(torch, factories), _replaced(torch.Tensor, new_empty):
        yield


@contextlib.contextmanager
def rounding_to_nearest() -> Iterator[None]:
    """fp32 becomes bf16 as in hardware: to the nearest, ties to even."""
    builder = interpreter.InterpreterBuilder
    stock = {name: getattr(builder, name) for name in ("cast_impl", "create_fp_to_fp")}

    def narrows(source, target) -> bool:
        return source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16

    def narrow(source, target):
        bits = np.ascontiguousarray(source.data, dtype=np.float32).view(np.uint32).astype(np.uint64)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        rounded = np.where(np.isnan(source.data), np.uint16(0x7FC0), rounded).reshape(np.shape(source.data))
        return interpreter.TensorHandle(rounded.view(interpreter._get_np_dtype(target)), target.scalar)

    def cast(self, source, target):
        return narrow(source, target) if narrows(source, target) else stock["cast_impl"](self, source, target)

    def to_float(self, source, target, *rest):
        if narrows(source, target):
            return narrow(source, target)
        return stock["create_fp_to_fp"](self, source, target, *rest)

    with _replaced(builder, {"cast_impl": cast, "create_fp_to_fp": to_float}):
        yield


@contextlib.contextmanager
def _replaced(owner, values: dict) -> Iterator[None]:
    before = {name: owner.__dict__[name] for name in values if name in owner.__dict__}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name in values:
            if name in before:
                setattr(owner, name, before[name])
            else:
                delattr(owner, name)
