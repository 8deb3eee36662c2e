"""Changes that tensor parallelism makes to modules besides its linear layers and embeddings.

Parameter names stay those of the undivided model: checkpoints and exports rely on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Change = Callable[[Tensor], Tensor]


class Reading(nn.Module):
    """A module that reads its own parameters through functions, such as one that sums their gradients.

    It takes over the parameters of `inner`, under the same names, so that engines which gather and free the parameters of a
    module at its call find them here.
    """

    def __init__(self, inner: nn.Module, changes: Mapping[str, Change]) -> None:
        super().__init__()
        for name, param in list(inner.named_parameters(recurse=False)):
            self.register_parameter(name, param)
            del inner._parameters[name]
        assert not [*inner.parameters(), *inner.buffers()], "a module that holds its parameters itself, and no buffers"
        self._changes = dict(changes)
        self.__dict__["_inner"] = inner  # not a child: a child would change the names

    def train(self, mode: bool = True) -> Reading:
        """Also of the inner module."""
        self.__dict__["_inner"].train(mode)
        return super().train(mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the inner module gives."""
        inner = self.__dict__["_inner"]
        names = list(self._parameters)
        for name in names:
            param = self._parameters[name]
            change = self._changes.get(name)
            inner.__dict__[name] = param if change is None or param is None else change(param)
        try:
            return inner(*args, **kwargs)
        finally:
            for name in names:
                del inner.__dict__[name]


def change_input(module: nn.Module, change: Callable[[Tensor, Mapping[str, Any]], Tensor]) -> None:
    """Puts every floating-point tensor that enters `module` by position, and `hidden_states`, through `change`.

    `change` is given the tensor and the keywords of the call.
    """

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        found = tuple(isinstance(arg, torch.Tensor) and arg.is_floating_point() for arg in args)
        args = tuple(change(arg, kwargs) if hit else arg for arg, hit in zip(args, found, strict=True))
        if "hidden_states" in kwargs:
            kwargs = {**kwargs, "hidden_states": change(kwargs["hidden_states"], kwargs)}
        assert any(found) or "hidden_states" in kwargs, f"{type(module).__name__} was called without hidden states"
        return args, kwargs

    module.register_forward_pre_hook(hook, with_kwargs=True)


def change_output(module: nn.Module, change: Change) -> None:
    """Puts the tensor that `module` gives through `change`."""

    def hook(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        return change(output)

    module.register_forward_hook(hook)
