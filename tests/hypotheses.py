"""What may be wrong with a server, as the tests of verifying make it."""

from dataclasses import replace

#: The strength of the recorded plan.
ALPHA = 2.0


def moved(plan, by):
    """The plan so many layers too high, as far as there are layers."""
    there = (plan.layer + by >= 0) & (plan.layer + by < plan.model.layers)
    part = plan.take(there.nonzero().flatten())
    return replace(part, layer=part.layer + by, replay=None)


def faults(alpha=ALPHA):
    """By the verdict: what makes (plan, alpha, scope) of a plan; None: nothing is steered."""
    return {
        "applied": lambda plan: (plan, alpha, "all"),
        "not applied": lambda plan: None,
        "applied elsewhere (layers + 1)": lambda plan: (moved(plan, 1), alpha, "all"),
        "applied elsewhere (layers - 1)": lambda plan: (moved(plan, -1), alpha, "all"),
        "sign flipped": lambda plan: (plan, -alpha, "all"),
        "half strength": lambda plan: (plan, alpha / 2, "all"),
        "double strength": lambda plan: (plan, alpha * 2, "all"),
        "prompt only": lambda plan: (plan, alpha, "prompt"),
        "generation only": lambda plan: (plan, alpha, "generation"),
    }
