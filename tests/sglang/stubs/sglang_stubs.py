"""Stands in for the binary packages that SGLang imports but that a machine without a GPU cannot use.

A stubbed name can be imported and looked at, never called for a result: calling anything it gives raises.
"""

import importlib.abc
import importlib.machinery
import sys
import types

MISSING = (
    *("torchvision", "torchao", "xgrammar", "IPython", "gguf", "zstandard", "watchfiles", "vllm._custom_ops"),
    *("soundfile", "datasets"),
)


class _Absent(type):
    """The type of everything that a stubbed package gives, usable as a base class or an annotation."""

    def __getattr__(cls, name: str) -> "_Absent":
        if name.startswith("__"):
            raise AttributeError(name)
        return _absent(name)

    def __call__(cls, *args: object, **kwargs: object) -> object:
        raise NotImplementedError(f"{cls.__name__} belongs to a package that is stubbed in this test")


def _absent(name: str) -> _Absent:
    def any_schema(cls, source, handler):
        from pydantic_core import core_schema

        return core_schema.any_schema()

    return _Absent(name, (), {"__get_pydantic_core_schema__": classmethod(any_schema)})


class _StubModule(types.ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> _Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return _absent(name)


class _StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname, path=None, target=None):
        inside = any(f"{fullname}.".startswith(f"{name}.") for name in MISSING)
        if inside or any(name.startswith(f"{fullname}.") for name in MISSING):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        return _StubModule(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.append(_StubFinder())
