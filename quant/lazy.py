"""Names of a package that are imported when they are first asked for, and module names of earlier versions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def names_of(package: str, homes: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """The `__getattr__` (PEP 562) of a package whose public names must not import torch before they are used.

    Args:
        package: the package's `__name__`.
        homes: module -> the names that it defines and the package offers.

    Returns:
        A function from a name to its value; AttributeError for other names.
    """
    home = {name: module for module, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(home[name]), name)

    return get


class _Renamed(MetaPathFinder, Loader):
    """Imports of a module by an earlier name give the module itself, so that each exists once."""

    def __init__(self) -> None:
        self.modules: dict[str, str] = {}
        self._specs: dict[str, ModuleSpec | None] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in self.modules else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(self.modules[spec.name])
        self._specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        name = module.__spec__.name if module.__spec__ is not None else ""
        module.__spec__ = self._specs.pop(name)  # the import system has put the earlier name there


_RENAMED = _Renamed()


def renamed(modules: Mapping[str, str]) -> None:
    """Let `import` find modules by earlier names as well: earlier name -> name, both dotted."""
    _RENAMED.modules.update(modules)
    if _RENAMED not in sys.meta_path:
        sys.meta_path.append(_RENAMED)
