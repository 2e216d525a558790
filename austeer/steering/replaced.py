"""What was put in the place of a steered module, or of its forward, while it was steered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import nn

from ..models.patches import own_forward
from ..models.structure import unwrap
from .editable import why_not_between
from .path import Path

#: Path of a module -> the module, and what a call of it runs.
Forwards = Mapping[str, tuple[nn.Module, Callable]]


def forwards_of(model: nn.Module, decoder: nn.Module, paths: Sequence[Path]) -> Forwards:
    """Of what is steered and of what lies around it in the decoder."""
    inside = {unwrap(module) for module in decoder.modules()} - {decoder}
    found = {}
    for path in paths:
        for name in _names(model, path):
            parts = name.split(".")
            for end in range(1, len(parts) + 1):
                above = ".".join(parts[:end])
                module = unwrap(model.get_submodule(above))
                if module in inside:
                    found[above] = (module, own_forward(module))
    return found


def replaced(model: nn.Module, paths: Sequence[Path], before: Forwards) -> list[str]:
    """What differs from ``before``, after steering: the paths of modules; hooks where a weight or bias is edited."""
    found = [name for name, (module, forward) in before.items() if not _is(model, name, module, forward)]
    if found:
        return [f"{name} is another module or has another forward" for name in found]
    edits = [(path, name) for path in paths if path.calls is None for name in _names(model, path)]
    return [reason for path, name in edits if (reason := why_not_between(model, path.site, name))]


def _is(model: nn.Module, name: str, module: nn.Module, forward: Callable) -> bool:
    try:
        found = unwrap(model.get_submodule(name))
    except AttributeError:
        return False
    return found is module and own_forward(module) == forward


def _names(model: nn.Module, path: Path) -> Iterator[str]:
    """The paths of the modules that a steered site changes."""
    for name, module in model.get_submodule(path.site.path).named_modules():
        if module in path.modules:
            yield f"{path.site.path}.{name}" if name else path.site.path
