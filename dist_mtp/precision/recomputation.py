"""Results that autograd lets go after the forward and that the backward computes again.

A function may save a tensor that costs less to compute again than to keep: the output of a norm whose input is kept anyway.
``torch.utils.checkpoint`` around norm and linear layer would repeat the linear layer's product, too. Here only what made the
tensor is repeated: while a :func:`recomputed` context is open, functions that save its result, or a view of it, are left with
a recipe instead (``torch.autograd.graph.saved_tensors_hooks``). Hooks of others around such a context do not see what
functions inside of it save.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

P = ParamSpec("P")
R = TypeVar("R", bound=Tensor | tuple[Tensor, ...])

_open: ContextVar[tuple[_Recipe, ...]] = ContextVar("open recipes", default=())
_recomputing: ContextVar[bool] = ContextVar("recomputing", default=False)


def is_recomputing() -> bool:
    """Whether what runs has run before, and whatever counts has counted it."""
    return _recomputing.get()


@contextmanager
def recomputed(wanted: bool, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Iterator[R]:
    """``function(*args)``, which functions inside of the context do not keep for their backward.

    The first backward that needs it calls ``function`` again, without gradients, and the result lives until the last one has
    taken it. So ``function`` must depend on nothing that changes meanwhile, and its arguments should be kept anyway.

    Args:
        wanted: if false, and where no gradients are recorded, this is only the call.
        function: gives a tensor, or several. Those that are written to by its own backward cannot be recomputed.
    """
    results = function(*args, **kwargs)
    if not wanted or not torch.is_grad_enabled():
        yield results
        return
    recipe = _Recipe(function, args, kwargs, _as_tuple(results))
    token = _open.set((*_open.get(), recipe))
    try:
        with saved_tensors_hooks(_pack, _unpack):
            yield results
    finally:
        _open.reset(token)
        recipe.places.clear()  # memory at these addresses may become another tensor's


def checkpointed(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """``function(*args)``, of which only tensors among ``args`` are kept; the backward calls it again as a whole."""
    if not torch.is_grad_enabled():
        return function(*args)
    result: Tensor = checkpoint(
        function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=_checkpoint_contexts
    )
    return result


class _Recipe:
    """How to make the results of one call again.

    ``places``: which result lies in the memory that starts at an address.
    """

    def __init__(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], results: tuple[Tensor, ...]
    ) -> None:
        self._function = function
        self._args = tuple(map(_without_history, args))
        self._kwargs = {name: _without_history(value) for name, value in kwargs.items()}
        # Empty tensors have no memory, and one address: they are kept as they are.
        self.places = {address: index for index, result in enumerate(results) if (address := _address(result))}
        self._unread = 0
        self._results: tuple[Tensor, ...] | None = None

    def keep(self, index: int, tensor: Tensor) -> _Kept:
        self._unread += 1
        return _Kept(self, index, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def take(self, index: int) -> Tensor:
        """Result ``index``; the last reader leaves nothing behind."""
        if self._results is None:
            with torch.no_grad(), _recompute():
                self._results = _as_tuple(self._function(*self._args, **self._kwargs))
        result = self._results[index]
        self._unread -= 1
        if self._unread <= 0:
            self._results = None
        return result


@dataclass(frozen=True)
class _Kept:
    """A result, or a view of one, that is not there."""

    recipe: _Recipe
    index: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def _pack(tensor: Tensor) -> Tensor | _Kept:
    address = _address(tensor)
    for recipe in reversed(_open.get()):
        index = recipe.places.get(address)
        if index is not None:
            return recipe.keep(index, tensor)
    return tensor


def _unpack(kept: Tensor | _Kept) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    return kept.recipe.take(kept.index).as_strided(kept.size, kept.stride, kept.offset)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _as_tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def _without_history(value: Any) -> Any:
    """A recipe is part of the graph and must not hold on to another part."""
    return value.detach() if isinstance(value, Tensor) else value


@contextmanager
def _recompute() -> Iterator[None]:
    token = _recomputing.set(True)
    try:
        yield
    finally:
        _recomputing.reset(token)


def _checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _recompute()
