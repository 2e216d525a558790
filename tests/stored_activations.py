"""Stored activations for tests, and their momentum by numpy, in float64, from all of them at once."""

import numpy as np
import torch
from safetensors.torch import save_file

from austeer.measuring.stored.writer import ActivationWriter
from austeer.models.sites import Fingerprint

SHAPES = {"attention": (3, 7), "ffn": (3, 5)}
MODEL = Fingerprint("llama", 4, {site: width for site, (_, width) in SHAPES.items()}, "tiny", None)
LAYERS = (0, 1, 3)


def random_rows(rows, dtype=torch.float32, shapes=SHAPES, seed=0):
    """site -> (positive, negative), each [rows, layers, width]; some pairs are ties."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for site, shape in shapes.items():
        positive, negative = torch.randn(2, rows, *shape, generator=generator).to(dtype)
        negative[::5] = positive[::5]
        found[site] = positive, negative
    return found


def write_blocks(folder, sides, block, *, skip=(), model=MODEL, layers=LAYERS, **options):
    """Writes all rows with an ActivationWriter, in blocks; pairs with a number in ``skip`` have no row."""
    rows = len(next(iter(sides.values()))[0])
    writer = ActivationWriter(folder, model, layers=layers, source="pairs.jsonl", **options)
    total = rows + len(skip)
    numbers = [n for n in range(total) if n not in skip]
    paths, row = [], 0
    for first in range(0, total, block):
        inside = [n for n in numbers if first <= n < first + block]
        buffers = {site: torch.cat([t[row : row + len(inside)] for t in pair]) for site, pair in sides.items()}
        pairs = min(block, total - first)
        paths.append(writer.add(buffers, inside, first=first, pairs=pairs, cut=1))
        row += len(inside)
    writer.finish(total)
    return paths


def write_plain(path, sides, rows=slice(None), **extra):
    """One shard as any other tool would write it."""
    tensors = {}
    for site, (positive, negative) in sides.items():
        tensors |= {f"{site}.positive": positive[rows].clone(), f"{site}.negative": negative[rows].clone()}
    save_file({**tensors, **extra}, path, metadata={"format": "pt"})
    return path


def assert_counts(momentum, sides):
    """Counts exactly, sums to the rounding of float64, against numpy."""
    assert set(momentum.sites) == set(sides)
    for site, (positive, negative) in sides.items():
        p, n, c = positive.double().numpy(), negative.double().numpy(), momentum.sites[site]
        assert np.array_equal(c.positive, (p > n).sum(0)) and np.array_equal(c.negative, (p < n).sum(0))
        assert np.allclose(c.delta_sum, (p - n).sum(0), rtol=1e-12, atol=1e-12)
        assert np.allclose(c.delta_square_sum, ((p - n) ** 2).sum(0), rtol=1e-12)


def assert_same(a, b):
    """Bit for bit."""
    assert (a.pairs, a.model, a.layers, a.cut, a.identical, a.sources, a.half_pairs) == (
        *(b.pairs, b.model, b.layers, b.cut, b.identical, b.sources, b.half_pairs),
    )
    for one, other in ((a.sites, b.sites), (a.half, b.half)):
        assert one.keys() == other.keys()
        for site in one:
            for x, y in zip(one[site].tensors().values(), other[site].tensors().values(), strict=True):
                assert torch.equal(x, y)
