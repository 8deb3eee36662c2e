"""Components by exact, explicit name: duplicates are errors, a near miss is named in the error."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from mmscale.errors import ConfigError

T = TypeVar("T")


def nearest(name: str, known: Iterable[str]) -> str:
    """A half sentence that names the closest known name, or lists all of them.

    Example:
        >>> nearest("lern", ["learn", "stop"])
        "did you mean 'learn'?"
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(names) or 'none'}"


class Registry(Generic[T]):
    """Maps names to components of one kind."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def add(self, name: str) -> Callable[[T], T]:
        """Decorator that registers a component under `name`. Raises ConfigError when the name is taken."""

        def register(item: T) -> T:
            if name in self._items:
                raise ConfigError(f"{self.kind} '{name}' is registered twice; choose another name")
            self._items[name] = item
            return item

        return register

    def get(self, name: str) -> T:
        """The component called `name`. Raises ConfigError with the nearest name when there is none."""
        if name not in self._items:
            raise ConfigError(f"unknown {self.kind} '{name}'; {nearest(name, self._items)}")
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._items))
