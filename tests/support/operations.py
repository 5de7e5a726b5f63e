"""How many operations a computation dispatches, and how often it makes the host wait for the device.

Found on the CPU, where nothing waits: by what is called.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

HOST_METHODS = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu")
"""Methods of a tensor that make the host wait for a GPU; some read a CPU tensor without any operation."""
HOST_OPERATIONS = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "equal", "lift_fresh")
"""Operations that do (``lift_fresh`` makes a tensor from Python numbers, which a copy then takes to the device), besides indexing by a mask and a ``repeat_interleave`` that must find its size."""


class CountOperations(TorchDispatchMode):
    """``total`` operations, and ``waits`` by the name of what waited, since it was entered."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.waits: Counter[str] = Counter()
        self._patches = ExitStack()

    def __enter__(self) -> CountOperations:
        for name in HOST_METHODS:
            self._patches.enter_context(mock.patch.object(Tensor, name, self._watched(name)))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._patches.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func).split(".")[1]
        finds_size = name == "repeat_interleave" and kwargs.get("output_size") is None
        self.total += 1
        if name in HOST_OPERATIONS or finds_size or (name.startswith("index") and _has_mask(args)):
            self.waits[name] += 1
        return func(*args, **kwargs)

    def _watched(self, name: str) -> Callable[..., Any]:
        original = getattr(Tensor, name)

        def method(*args: Any, **kwargs: Any) -> Any:
            self.waits[name] += 1
            return original(*args, **kwargs)

        return method


def _has_mask(args: tuple[Any, ...]) -> bool:
    indices = [each for arg in args if isinstance(arg, list | tuple) for each in arg]
    return any(isinstance(each, Tensor) and each.dtype == torch.bool for each in indices)
