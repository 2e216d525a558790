"""What tests of momentum share: pairs that tell their number, and the naive loop that measuring must equal."""

import torch

from austeer import Pairs

SITES = ("attention", "ffn")
TEXT = "the soup bread view of a quiet old green river and its many boats was really not very good bad fresh"
WORDS = TEXT.split()
COUNTS = ("positive", "negative")


def texts_of(pairs):
    return [p.prompt + p.positive for p in pairs] + [p.prompt + p.negative for p in pairs]


def naive_activations(model, tokenizer, texts):
    """Each text alone, unpadded, through the full model: site -> [texts, layers, width] at the last token."""
    kept = {name: [] for name in SITES}
    handles = []
    for layer in model.model.layers:
        handles.append(
            layer.self_attn.o_proj.register_forward_pre_hook(lambda m, args: kept["attention"].append(args[0][0, -1]))
        )
        handles.append(layer.mlp.register_forward_hook(lambda m, args, output: kept["ffn"].append(output[0, -1])))
    with torch.no_grad():
        for text in texts:
            model(**tokenizer(text, return_tensors="pt"))
    for handle in handles:
        handle.remove()
    layers = len(model.model.layers)
    return {name: torch.stack(rows).unflatten(0, (len(texts), layers)) for name, rows in kept.items()}


def numbered_pairs(count):
    """Pairs of random words, of unlike lengths, that tell their number."""
    generator = torch.Generator().manual_seed(count)

    def some(n):
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator))

    return Pairs.of(
        [(f"{i} {some(1 + i * 7 % 13)}", f" {some(1 + i % 3)} good", f" {some(1 + i % 2)} bad") for i in range(count)]
    )


def assert_like(found, expected):
    """The same momentum, up to the order of float64 sums."""
    for what in ("pairs", "model", "cut", "identical", "sources"):
        assert getattr(found, what) == getattr(expected, what), what
    assert set(found.sites) == set(expected.sites)
    assert (found.half is None, found.half_pairs) == (expected.half is None, expected.half_pairs)
    everything = [(found.sites, expected.sites), *([(found.half, expected.half)] if expected.half else [])]
    for name in expected.sites:
        for of_found, of_expected in everything:
            mine, theirs = of_found[name].tensors(), of_expected[name].tensors()
            for what, t in theirs.items():
                if what in COUNTS:
                    assert torch.equal(mine[what], t), (name, what)
                else:
                    torch.testing.assert_close(mine[what], t, rtol=1e-9, atol=1e-12)
