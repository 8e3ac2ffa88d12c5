"""Lazy imports of a package's public names, and imports by module names of earlier versions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def names_of(package: str, homes: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """Create a package's `__getattr__` (PEP 562), so that its public names import torch only when they are used.

    Args:
        package: The package's `__name__`.
        homes: Module -> names that it defines and the package exports.

    Returns:
        A function from a name to its value, which raises AttributeError for other names.
    """
    home = {name: module for module, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(home[name]), name)

    return get


class _Renamed(MetaPathFinder, Loader):
    """Imports a module under its earlier name as well: the same module object, so that each exists once."""

    def __init__(self) -> None:
        self.modules: dict[str, str] = {}
        self._specs: dict[str, ModuleSpec | None] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a module that has been renamed."""
        return ModuleSpec(fullname, self) if fullname in self.modules else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Import the module under its current name."""
        module = import_module(self.modules[spec.name])
        self._specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Restore the spec; the module itself has already run."""
        name = module.__spec__.name if module.__spec__ is not None else ""
        module.__spec__ = self._specs.pop(name)  # the import system has replaced it by one of the earlier name


_RENAMED = _Renamed()


def renamed(modules: Mapping[str, str]) -> None:
    """Make modules importable under earlier names, too.

    Args:
        modules: Earlier dotted name -> current dotted name.
    """
    _RENAMED.modules.update(modules)
    if _RENAMED not in sys.meta_path:
        sys.meta_path.append(_RENAMED)
