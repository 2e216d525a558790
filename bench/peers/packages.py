"""What the other libraries' ways to steer need: their packages, and a model whose gradient flags stay as they were."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from torch import nn

from ..steered import UnavailableError

COMMAND = "pip install -c constraints.txt"
#: What the other libraries need at run time and this one does not.
EXTRA = "'.[peers]'"


def needed(module: str, pip: str) -> ModuleType:
    """The module, imported.

    Args:
        pip: what installs it: the arguments of ``pip install -c constraints.txt``, in the checkout.

    Raises:
        UnavailableError: it is not installed, or does not work with the versions that are here.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise missing(module, pip if error.name == module else EXTRA, error.name) from error
    except Exception as error:  # other people's package may fail in any way
        raise UnavailableError(
            f"{module} cannot be imported here: {type(error).__name__}: {error}; "
            f"install the versions that were measured: {COMMAND} {pip}"
        ) from error


def missing(module: str, pip: str, found_no: str | None = None) -> UnavailableError:
    """The error for a package that is not there, or one that it needs."""
    return UnavailableError(f"{module}: found no module {found_no or module!r}; install it with: {COMMAND} {pip}")


@contextmanager
def gradient_flags_kept(model: nn.Module) -> Iterator[None]:
    """Sets ``requires_grad`` as it was, on parameters that other models share."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
