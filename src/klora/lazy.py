"""Packages whose names are imported when they are first asked for (PEP 562)."""

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any


class _Package(ModuleType):
    """A package that exports names of its own modules: `kernels.linear` is the function.

    The import system binds a module in its package once it is loaded, at any time. Here the exported name goes first.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in self.__dict__["__all__"] and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def lazy_exports(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` for `package`: what it imports under `if TYPE_CHECKING` is imported on first use.

    So people and tools read ordinary imports, and nothing is listed twice. The package's source must be there, as it
    must for Triton.
    """
    module = sys.modules[package]
    module_of = {  # None where the name is a module's own
        alias.name: statement.module
        for block in ast.parse(module.__loader__.get_source(package)).body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for statement in block.body
        for alias in statement.names
    }

    def __getattr__(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = import_module(f".{module_of[name] or name}", package)
        if module_of[name]:
            value = getattr(value, name)
        setattr(module, name, value)
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(module), *module_of})

    module.__class__ = _Package
    return __getattr__, __dir__
