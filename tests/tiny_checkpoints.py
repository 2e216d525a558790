"""Checkpoints of tiny models, before and after plans are folded into them."""

import json
from contextlib import ExitStack

import torch
from safetensors.torch import load_file

from austeer.models.sites import find_sites
from dense_formula import formula_at, logits

BATCH = {"input_ids": torch.tensor([[3, 1, 40, 22, 9], [7, 7, 12, 50, 2]])}


def saved(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


def loaded(folder, like, dtype=torch.float32):
    return type(like).from_pretrained(folder, dtype=dtype).eval()


def expected(model, *pairs):
    with ExitStack() as stack:
        for plan, alpha in pairs:
            stack.enter_context(formula_at(model, plan, alpha))
        return logits(model, BATCH)


def assert_steered(model, found, wanted):
    effect = (wanted - logits(model, BATCH)).abs().max()
    assert effect > 0.02
    assert (found - wanted).abs().max() < 1e-5 * max(1, effect)


def tensors_of(folder):
    return {key: t for file in folder.glob("*.safetensors") for key, t in load_file(file).items()}


def record(out):
    return json.loads((out / "austeer.json").read_text())


def folding_sites(model):
    return [name for name in find_sites(model) if name != "layer"]
