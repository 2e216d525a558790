"""What austeer raises: each error says what was expected, what was found, and what to do."""

from __future__ import annotations

import operator


class AusteerError(Exception):
    """Base of every error that austeer raises on purpose. The command line turns it into exit code 2."""


class PairsError(AusteerError):
    """Contrastive pairs that cannot be read or used."""


class TaskError(AusteerError):
    """A labelled task that cannot be read or used, or a search on it that cannot be made."""


class SiteError(AusteerError):
    """A site that the model does not have, or a model whose sites are not known."""


class CaptureError(AusteerError):
    """Activations that could not be read, or are not finite."""


class GradientError(CaptureError):
    """A model, or a site of it, whose gradients cannot be had."""


class SelectionError(AusteerError):
    """A selection that the momentum cannot satisfy."""


class FileFormatError(AusteerError):
    """A file that is damaged, foreign, or of an unknown version."""


class PlanError(AusteerError):
    """A plan that is not valid, or not for this model."""


class SteeringError(AusteerError):
    """Steering that cannot be put on a model as asked."""


class AusteerWarning(UserWarning):
    """What a user should know of what goes on; the command line prints it as a note."""


class SteeringWarning(AusteerWarning):
    """Steering that does something else than was asked for."""


def check_count(name: str, value: object, largest: int | None, of: str, error: type[AusteerError]) -> int:
    """``value`` as an int if it is a whole number from 1 to ``largest`` (also NumPy's); otherwise raises ``error``."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = 0
    if isinstance(value, bool) or number < 1 or (largest is not None and number > largest):
        most = "of at least 1" if largest is None else f"from 1 to {largest}"
        raise error(f"{name}: found {value!r}, expected an integer {most} ({of})")
    return number


class ModelError(AusteerError):
    """A model that cannot be loaded."""


def one_line(error: BaseException) -> str:
    """What someone else's error says, for a message of ours."""
    return " ".join(str(error).split())[:300].rstrip(". ") or type(error).__name__


def count_of(number: int, noun: str) -> str:
    """A number with its noun, as people write it: ``1 AU``, ``2 AUs``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
