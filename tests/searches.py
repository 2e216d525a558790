"""What tests of the search share: a task of words, neutral texts, and momentum with the demo's tokenizer."""

import austeer
from austeer.pairs.pairs import Pairs
from austeer.tasks import Item, Task
from austeer.tuning import Arm, Material

NOUNS = ["soup", "film", "book", "walk", "song", "house", "garden", "train"]
NOUNS += ["picture", "story", "winter", "lake", "road", "market", "dinner", "window"]
NEUTRAL = [
    "The river runs north of the old mill, where two roads meet.",
    "A barometer measures the pressure of the air.",
    "Two boats left.",
]


def words(count: int = 16, kind: str = "choice") -> Task:
    """Items of two one-token options; the label alternates."""
    items = [Item(f"The {noun} was", (" good", " bad"), i % 2) for i, noun in enumerate(NOUNS[:count])]
    return Task("words", kind, tuple(items))


def material_of(model, tokenizer, sites=("attention", "ffn")) -> Material:
    pairs = Pairs.of([(f"I think the {noun} is", " good", " bad") for noun in NOUNS[:12]])
    return Material(model, tokenizer, pairs, austeer.measure(model, tokenizer, pairs, sites, progress=False))


def arms_of(material: Material, sites=("attention",), operations=("scale", "shift"), ks=(2, 8)) -> list[Arm]:
    found = []
    for site in sites:
        for operation in operations:
            plan = material.momentum.select(site, k=max(ks), operation=operation)
            found += [Arm("momentum", plan, k) for k in ks]
    return found
