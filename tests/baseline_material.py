"""Material for methods on a tiny model, and activations read text by text with plain hooks: the reference."""

import torch

import austeer
from austeer.demo.demo import load_data
from austeer.models.sites import SITE_NAMES, find_sites
from austeer.tuning import Material
from dense_formula import logits

PAIRS = load_data().tuning[:14]
IDS = {"input_ids": torch.tensor([[5, 6, 7, 300, 12], [9, 8, 44, 2, 17]])}


def material_of(model, tokenizer, pairs=PAIRS, sites=SITE_NAMES):
    return Material(model, tokenizer, pairs, austeer.measure(model, tokenizer, pairs, sites, progress=False))


def hooked(model, site, change):
    """Logits with ``change`` applied to the site's tensor."""
    module = model.get_submodule(site.path)
    if site.side == "input":
        handle = module.register_forward_pre_hook(lambda m, args: (change(args[0]), *args[1:]))
    else:
        handle = module.register_forward_hook(
            lambda m, args, out: (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)
        )
    with handle:
        return logits(model, IDS)


def reference_activations(model, tokenizer, pairs, site):
    """(positive, negative): float64 [pairs, layers, width], of each text's last token, one text at a time."""
    found = find_sites(model, [site])[site]

    def read(text):
        rows = [None] * len(found)
        handles = []
        for number, place in enumerate(found):
            module = model.get_submodule(place.path)

            def keep(x, number=number):
                rows[number] = x[0, -1].clone().double()

            if place.side == "input":
                handles.append(module.register_forward_pre_hook(lambda m, args, keep=keep: keep(args[0])))
            else:
                handles.append(
                    module.register_forward_hook(
                        lambda m, args, out, keep=keep: keep(out[0] if isinstance(out, tuple) else out)
                    )
                )
        with torch.no_grad():
            model(**tokenizer(text, return_tensors="pt"))
        for handle in handles:
            handle.remove()
        return torch.stack(rows)

    return tuple(torch.stack([read(p.prompt + getattr(p, side)) for p in pairs]) for side in ("positive", "negative"))
