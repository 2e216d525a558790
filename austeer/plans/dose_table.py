"""The dose of a plan at several strengths, for people: what is predicted, beside what was measured."""

from __future__ import annotations

from dataclasses import dataclass

from .dose import Dose

#: The side effects at which a dose is shown: nats a token.
LEVELS = (0.02, 0.05, 0.1)

#: A measured strength so near to one of a level stands for it.
NEAR = 0.05


@dataclass(frozen=True)
class DoseRow:
    """A plan at one strength: KL(unsteered || steered) on neutral text, nats a token, and the effect, nats.

    Attributes:
        predicted: to first order of the shifts. measured: None where it was not. effect: predicted; None if not known.
    """

    alpha: float
    predicted: float
    measured: float | None
    effect: float | None


def dose_rows(dose: Dose, levels: tuple[float, ...] = LEVELS) -> list[DoseRow]:
    """All AUs at the strengths of some KLs, as far as is known, and at those that were measured, ascending.

    Example:
        >>> [row.predicted for row in dose_rows(Dose(kl=(0.05, 0.1)), levels=(0.1, 0.4))]
        [0.1, 0.4]
    """
    count = len(dose.kl)
    measured = {point.alpha: point.kl for point in dose.measured if point.k == count}
    known = measured or dose.kl[-1] > 0
    strengths = [dose.alpha(level) for level in levels] if known else []
    further = [a for a in strengths if all(abs(a / other - 1) > NEAR for other in measured)]
    return [
        DoseRow(alpha, dose.kl[-1] * alpha * alpha, measured.get(alpha), dose.effect_of(alpha))
        for alpha in sorted({*measured, *further})
    ]


def dose_table(rows: list[DoseRow]) -> list[list[str]]:
    """The rows in print, with a row of headings; without columns of what is not known."""
    columns = {
        "alpha": [f"{row.alpha:.3g}" for row in rows],
        "predicted KL": [f"{row.predicted:.3g}" for row in rows],
        "measured KL": ["" if row.measured is None else f"{row.measured:.3g}" for row in rows],
        "predicted effect, nats": ["" if row.effect is None else f"{row.effect:+.2f}" for row in rows],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    return [list(columns), *map(list, zip(*columns.values()))]


def dose_legend(dose: Dose, rank: str | None) -> str:
    """What the columns are, in words. ``rank``: the plan's."""
    where = "on other pairs than those that chose the AUs" if rank == "effect" else "on the pairs that were measured"
    effect = f"; effect: to first order, {where}" if dose.effect else ""
    return (
        f"KL: of the next token on {dose.texts}, nats a token; a predicted one is right for small shifts, with a "
        f"standard error of {dose.error:.0%}{effect}"
    )
