"""Whether what a linear layer makes reaches a site's tensor as it is: then to steer the one is to steer the other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .sites import Site
from .structure import first_tensor, floating_dtype, input_device


def why_not_the_projection(model: nn.Module, site: Site) -> str | None:
    """The reason why the tensor of an output-side site is not what its projection gives, or None if it is.

    Found by running the block once on random numbers: its code need not be what its modules suggest (a factor, a skip
    connection, a second branch, in training dropout).
    """
    if site.side != "output" or site.projection in (None, site.path):
        return None
    block, projection = model.get_submodule(site.path), model.get_submodule(str(site.projection))
    weight = next(projection.parameters())
    x = torch.randn(1, 4, site.width, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    device = input_device(model) if weight.device.type == "meta" else weight.device  # offloaded: loaded as it runs
    x = x.to(device, weight.dtype if weight.is_floating_point() else floating_dtype(model))
    made: list[Tensor] = []
    handle = projection.register_forward_hook(lambda module, args, output: made.append(output.clone()))
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            found = first_tensor(type(block).forward(block, x))
    except Exception as error:  # of someone else's code: whatever it is, the block needs more than its input
        return f"{site.path} does not run by itself ({type(error).__name__})"
    finally:
        handle.remove()
    if len(made) != 1 or not torch.equal(made[0].reshape(-1), found.reshape(-1)):
        return f"{site.path} does more to the tensor than its projection"
    return None


def why_not_own_code(model: nn.Module, site: Site, path: str) -> str | None:
    """The reason why the module at ``path`` need not add to the site's tensor, or read it, as the family's code does.

    What the table of families says was read in Transformers' code; other code of the same names may do anything.
    """
    names = path.split(".")
    # At the input side what calls the projection: it may multiply by the weight itself.
    first = len(site.path.split(".")) if site.side == "output" else names.index(str(site.layer)) + 2
    for end in range(first, len(names)):
        module = model.get_submodule(".".join(names[:end]))
        if not type(module).forward.__module__.startswith("transformers.models."):
            return f"the forward of {'.'.join(names[:end])} is not Transformers' own"
    return None
