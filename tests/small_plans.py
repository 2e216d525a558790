"""Plans of a few AUs for a model that is not there, and evidence of one."""

import torch
from hypothesis import strategies as st

from austeer import Plan
from austeer.evidence import Evidence, Outcome, Overhead
from austeer.sites import Fingerprint

MODEL = Fingerprint("llama", 4, {"attention": 6, "ffn": 9}, "user/model – ü", "abc123")


def plan_of(keys, operation="scale", model=MODEL, seed=0, **rest):
    generator = torch.Generator().manual_seed(seed)
    return Plan(
        site=tuple(site for site, _, _ in keys),
        layer=torch.tensor([layer for _, layer, _ in keys], dtype=torch.int32),
        index=torch.tensor([index for _, _, index in keys], dtype=torch.int32),
        beta=torch.rand(len(keys), generator=generator) * 2 - 1,
        delta=torch.randn(len(keys), generator=generator),
        operation=operation,
        model=model,
        pairs=17,
        **rest,
    )


def keys_of(sites=("attention", "ffn"), max_size=20):
    one = st.one_of([st.tuples(st.just(s), st.integers(0, 3), st.integers(0, MODEL.widths[s] - 1)) for s in sites])
    return st.lists(one, min_size=1, max_size=max_size, unique=True)


PLAN = plan_of([("ffn", 3, 8), ("attention", 0, 5), ("ffn", 0, 0)])

EVIDENCE = Evidence(
    effect="mean change of log-odds, nats",
    side_effect="rise of the cross-entropy, nats a token",
    tested=(Outcome(2, "9 pairs", 0.5, side_effect=0.01), Outcome(4, "9 pairs", 0.9, 0.6, 1.2, 1.0, 0.04)),
    alpha=4,
    overhead=(Overhead(0.4, "Xeon, 2 cores", "fold", "float32, batch 1", -1.2, 2.1),),
)
KNOWN = PLAN.with_evidence(EVIDENCE)
