"""How diffusers is imported: as a whole, or in a command without the packages that its VAEs do not use."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

# What diffusers' VAEs do not use. With PyTorch's compiler, which is only told what not to compile, it takes 2 s.
UNUSED = ("accelerate", "peft", "scipy", "transformers")
COMPILER = "torch._dynamo"
_in_command = False


def declare_command() -> None:
    """Say that this process runs a command, in which nobody else uses diffusers: then it is imported in 0.6 s, not 3 s.

    Not for a library's callers, who may want to use all of diffusers beside it.
    """
    global _in_command
    _in_command = True


def import_diffusers() -> Any:
    """The package diffusers, with its VAEs.

    Returns:
        the module; in a command, one that works without PEFT, transformers and accelerate.
    """
    with _hidden() if _in_command and "diffusers" not in sys.modules else nullcontext():
        import diffusers
        from diffusers import AutoencoderKL  # noqa: F401  Only then are the modules of the VAEs imported, all at once.
    return diffusers


@contextmanager
def _hidden() -> Iterator[None]:
    """Let `UNUSED` not be found while the block runs, and the compiler only be imported where something runs it."""
    absent = [name for name in UNUSED if name not in sys.modules]
    stand_in = ModuleType(COMPILER)
    stand_in.__dict__.update(allow_in_graph=_unchanged, disable=_unchanged, __getattr__=_of_the_compiler)
    replaced = COMPILER not in sys.modules
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]  # None: not found
    sys.modules.setdefault(COMPILER, stand_in)
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]
        if replaced and sys.modules.get(COMPILER) is stand_in:
            del sys.modules[COMPILER]


def _unchanged(function: Any = None, *_: Any, **__: Any) -> Any:
    """A decorator, with or without arguments, that leaves what it decorates alone."""
    return function if function is not None else _unchanged


def _of_the_compiler(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    del sys.modules[COMPILER]
    return getattr(importlib.import_module(COMPILER), name)
