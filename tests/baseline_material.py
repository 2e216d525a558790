"""Material for methods on a tiny model, and activations read text by text with plain hooks: the reference."""

import torch

import austeer
from austeer.demo.demo import load_data
from austeer.models.sites import SITE_NAMES, find_sites
from austeer.tuning import Material
from dense_formula import hook, logits

PAIRS = load_data().tuning[:14]
IDS = {"input_ids": torch.tensor([[5, 6, 7, 300, 12], [9, 8, 44, 2, 17]])}


def material_of(model, tokenizer, pairs=PAIRS, sites=SITE_NAMES, profiled=False):
    momentum = austeer.measure(model, tokenizer, pairs, sites, effects=profiled, progress=False)
    profile = austeer.profile(model, tokenizer, sites, draws=48, progress=False) if profiled else None
    return Material(model, tokenizer, pairs, momentum, profile)


def hooked(model, site, change):
    """Logits with ``change`` applied to the site's tensor."""
    with hook(model, site, change):
        return logits(model, IDS)


def reference_activations(model, tokenizer, pairs, site):
    """(positive, negative): float64 [pairs, layers, width], of each text's last token, one text at a time."""
    found = find_sites(model, [site])[site]

    def read(text):
        rows = [None] * len(found)
        handles = []
        for number, place in enumerate(found):

            def keep(x, number=number):
                rows[number] = x[0, -1].clone().double()
                return x

            handles.append(hook(model, place, keep))
        with torch.no_grad():
            model(**tokenizer(text, return_tensors="pt"))
        for handle in handles:
            handle.remove()
        return torch.stack(rows)

    return tuple(torch.stack([read(p.prompt + getattr(p, side)) for p in pairs]) for side in ("positive", "negative"))
