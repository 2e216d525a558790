"""steer(): plans on a model, with a strength or an allowed side effect."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..errors import SteeringError
from ..models.sites import Layout
from ..models.structure import unwrap
from ..momentum.profile import Profile
from ..plans.plan import Plan
from ..plans.probe import Probe
from .doses import measured_doses, plans_with_doses
from .scope import ScopeLike
from .steering import Steering
from .strength import Alpha, Strength, named_plans


def steer(
    model: nn.Module,
    plan: Plan | Mapping[str, Plan],
    alpha: Alpha | None = None,
    *,
    kl: float | Mapping[str, float] | None = None,
    k: int | Mapping[str, int] | None = None,
    scope: ScopeLike = "all",
    mode: str = "auto",
    layout: Layout | None = None,
    check: bool = True,
    profile: Profile | None = None,
    exact: bool = True,
    when: Probe | None = None,
) -> Steering:
    """Steers a model with a plan, inside a ``with`` block (paper: x + alpha * beta * x at every position).

    Example:
        >>> inputs = tokenizer("The soup was", return_tensors="pt")
        >>> with austeer.steer(model, plan, alpha=8) as steering:
        ...     there = model.generate(**inputs, max_new_tokens=8)
        ...     steering.alpha = 4  # live
        ...     paths = {site.path for site in steering.report()}
        >>> paths, austeer.is_steered(model)
        ({'fold'}, False)

    Everything is checked before anything is touched, and on leaving the block the model is restored bit for bit, also
    after an exception. Only layers in which the plan has AUs are touched.

    Inside the block the model *is* the steered one: a copy or a checkpoint made there, and another model on the same
    memory, may hold steered weights or biases. To train it, put it into training mode before the block, in which
    nothing is then folded, and call backward inside it. A compiled model is compiled again where something runs in
    other layers than in blocks before, and in each block with rows or a scope.

    Args:
        model: a Transformers model on any devices, also offloaded or compiled, or PEFT's wrapper of one.
        plan: from ``Momentum.select`` or ``Plan.from_pretrained``; or several by name, of which
            :meth:`Steering.rows` then gives each row of a batch its own, or none.
        alpha: the strength; a number, or one for each site of the plan by name, or either of them for each plan by
            name; 1 by default. 0 steers nothing, and a negative number steers the other way (not under "scale", see
            Plan).
        kl: in place of alpha, the KL(unsteered || steered) on neutral text that is allowed, nats a token; or one for
            each plan by name. Of plans of "shift" with a dose (``Momentum.select`` with a profile) or with ``profile``.
            It is that of all tokens steered, whatever the scope.
        k: steer only the k most important AUs, of each plan or by name; all by default.
        scope: the tokens to steer: "all"; "prompt"; "generation", what comes after the prompt; "last_prompt_token";
            "from_last_prompt_token", that and what comes after it; or a half-open range such as (0, 16) or (16, None),
            counted from each row's first token after its padding; or :func:`austeer.answer_scope`, what comes after
            the prompt but thoughts and calls of tools. The first generated token is chosen at the last
            prompt token: "generation" leaves it as it is, "from_last_prompt_token" steers the choice of every one.
            See :attr:`Steering.prompt_length` for what the prompt is where the model is called without ``generate``.
        mode: the path, see ``report()``: "fold" scales weights in place and "bias" writes a shift into biases, both
            at no cost at run time (under the scopes "prompt", "generation" and "from_last_prompt_token" biases are
            there for passes that are wholly in scope, and others run as "columns"); "fused" runs our projection kernel
            for up to 64 tokens and "columns" beyond, "columns" steers the tensor itself by the cheapest form for where
            it runs, "dense" is the public code's arithmetic. "auto" takes fold or bias where it is exact and possible,
            fused while a CUDA graph is captured if it was measured to be no slower on this device, otherwise columns.
        layout: attribute paths of a model whose family is not known.
        check: compare one site of each path with the formula, once.
        profile: with kl, the model's profile, for a plan without a dose.
        exact: with kl, see what the predicted strength does to some neutral text, and correct it: two steps at most, of
            two forward passes over some five hundred tokens.
        when: steer only rows on whose prompts this probe fires (:func:`austeer.fit_probe`). It reads the last prompt
            token, and so is of the scopes "generation" and of an answer.

    Raises:
        PlanError: the plan or the probe is for another architecture, or k does not fit.
        SiteError: the model lacks a site.
        SteeringError: alpha is not finite, ``scope`` is none, or ``mode`` is not possible at a site (which is named
            with the reason); or a KL is asked for that cannot be predicted, not be measured, or not be reached.
        CaptureError: with kl, a model without a head. SelectionError: a profile of other weights.
    """
    if kl is None:
        return Steering(model, plan, 1.0 if alpha is None else alpha, k, scope, mode, layout, check, when)
    if alpha is not None:
        raise SteeringError(f"found both alpha ({alpha!r}) and kl ({kl!r}), expected one of them")
    if profile is not None:
        profile.check_weights(unwrap(model))
    named = isinstance(plan, Mapping)
    plans = plans_with_doses(named_plans(plan), profile)
    levels = Strength(plans, named)
    levels.set_k(k)
    if exact:
        given = plans if named else next(iter(plans.values()))
        Steering(model, given, 1.0, k, scope, mode, layout, check, when)  # what cannot be is refused before measuring

        def probe(alphas: Mapping[str, float]) -> Steering:
            return Steering(model, plans, alphas, levels.k_by_name(), "all", "auto", layout, False)

        plans = measured_doses(unwrap(model), plans, levels.kl_by_name(kl), levels.k_by_name(), profile, probe)
    levels = Strength(plans, named)
    levels.set_k(k)
    given = plans if named else next(iter(plans.values()))
    return Steering(model, given, levels.alpha_for(kl), k, scope, mode, layout, check, when)
