"""Named parts: what `backbone=vit` and `pruning=topk` look up.

A third-party package adds parts by naming a module in the entry-point group
`prune_tell.plugins`; importing that module runs its `@registry.register(...)` lines.
"""

from collections.abc import Callable, Iterator
from difflib import get_close_matches
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from prune_tell.errors import UserError

Part = TypeVar("Part")
Builder = TypeVar("Builder", bound=Callable[..., Any])


@cache
def load_plugins() -> None:
    """Import every module that an installed package names under `prune_tell.plugins` (once)."""
    for entry in entry_points(group="prune_tell.plugins"):
        entry.load()


def nearest(name: str, choices: list[str]) -> str:
    """Return `; did you mean 'x'?` for the choice closest to `name`, or an empty string."""
    close = get_close_matches(name, choices, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


class Registry(Generic[Part]):
    """Maps a name to the builder of one kind of part; builders take flat keyword arguments."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._builders: dict[str, Callable[..., Part]] = {}

    def register(self, name: str) -> Callable[[Builder], Builder]:
        """Decorate a builder (a function or a class) so that `name` finds it."""
        if name in self._builders:
            raise ValueError(f"{self.kind} '{name}' is registered twice")

        def add(builder: Builder) -> Builder:
            self._builders[name] = builder
            return builder

        return add

    def __getitem__(self, name: str) -> Callable[..., Part]:
        load_plugins()
        if name not in self._builders:
            names = sorted(self._builders)
            raise UserError(f"{self.kind}={name} is unknown (one of: {', '.join(names)}){nearest(name, names)}")
        return self._builders[name]

    def __iter__(self) -> Iterator[str]:
        load_plugins()
        return iter(sorted(self._builders))
