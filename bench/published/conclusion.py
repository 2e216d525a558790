"""The plain-words conclusion: sentences that follow by rule from the verdicts, whichever way those fall."""

from __future__ import annotations

from collections.abc import Sequence

from austeer.utils.tables import signed

from ..intervals import FASTER, NOISE, SAME, SLOWER, UNCLEAR
from .inference import DENSE, METRICS, PUBLIC, SPARSE, Case, Inference, Overhead
from .tables import capital

#: The paper's only figure: whole task runs of Gemma2-9B on an H100, steered over unsteered, percent.
PAPER = 2.8
_NOISE = f"{100 * NOISE:.0f} %"
_WORDS = {SLOWER: "slower than", FASTER: "faster than", SAME: "the same as", UNCLEAR: "not told apart from"}


def sentences(inference: Inference) -> list[str]:
    """Markdown sentences on one machine and model, the last one on what the paper's claim is worth there."""
    cases = inference.main()
    quiet = [case for case in cases if case.decidable("token")]
    if not cases:
        return ["No main case was measured, so there is no verdict."]
    if not quiet:
        least = min(case.noise("token") for case in cases)
        return [
            f"No verdict: in each of {len(cases)} cases two unsteered runs may differ by more than {_NOISE} (at best "
            f"by {least:.1f} %). Measure again on a quieter machine."
        ]
    found = [_noise(cases, quiet)]
    for metric, where in METRICS.items():
        timed = [case for case in cases if case.times(metric)]
        some = [case for case in timed if case.decidable(metric)]
        if timed and not some:
            noise = _span([case.noise(metric) for case in timed], "")
            name = where.split(",")[0].capitalize()
            found.append(f"**{name}**: no verdict in any of {len(timed)} cases (noise {noise}).")
            continue
        names = [PUBLIC, *dict.fromkeys(name for case in some for name in case.ours())]
        parts = [part for name in names if (part := _counted(name, some, metric))]
        if parts:
            found.append(f"**{capital(where)}**: {'; '.join(parts)}.")
    return [*found, *_paper(quiet), f"**The claim here**: {worth(quiet)}"]


def _noise(cases: Sequence[Case], quiet: Sequence[Case]) -> str:
    text = f"{len(quiet)} of {len(cases)} cases are quiet enough for a verdict on decoding"
    if len(quiet) < len(cases):
        text += (
            f"; in the other{'s' * (len(cases) - len(quiet) > 1)}, two unsteered runs may differ by more than {_NOISE}"
        )
    return text + f". Two unsteered runs agree within {max(case.noise('token') for case in quiet):.1f} % in these."


def _counted(name: str, cases: Sequence[Case], metric: str) -> str:
    """``columns slower than unsteered in 2 of 3 cases (+1.0 to +2.0 %), the same as unsteered in 1``; "" if untimed."""
    overheads = [o for case in cases if (o := case.overhead(name, metric)) is not None]
    parts = []
    for verdict, words in _WORDS.items():
        own = [o.median for o in overheads if o.verdict == verdict]
        if own:
            parts.append(f"{words} unsteered in {len(own)} of {len(overheads)} ({_span(own)})")
    return f"{name} is {', '.join(parts)}" if parts else ""


def _paper(quiet: Sequence[Case]) -> list[str]:
    found = [o for case in quiet if (o := case.overhead(PUBLIC, "token")) is not None]
    below, above = sum(o.high < PAPER for o in found), sum(o.low > PAPER for o in found)
    text = f"The paper's {PAPER} % lies within the public form's interval in {len(found) - below - above}"
    text += f" of {len(found)}" + (f", above it in {below}" if below else "")
    text += (f", below it in {above}" if above else "") + "; it is of whole task runs on an H100, the intervals are"
    return [f"{text} of a decoded token here."] if found else []


def _relations(quiet: Sequence[Case]) -> list[str]:
    """How touching k AUs compares with touching the whole width, in the same kind of PyTorch hook, case by case."""
    both = [(case.overhead(SPARSE, "token"), case.overhead(DENSE, "token")) for case in quiet]
    return [sparse.compared(dense) for sparse, dense in both if sparse and dense]


def worth(quiet: Sequence[Case]) -> str:
    """What 'steering fewer activations is cheaper' comes to, in up to three sentences."""
    public = [(case, o) for case in quiet if (o := case.overhead(PUBLIC, "token")) is not None]
    if not public:
        return "the public form has no time in any quiet case, so it cannot be judged."
    slower = [(case, o) for case, o in public if o.verdict == SLOWER]
    unclear = sum(o.verdict not in (SLOWER, SAME, FASTER) for _, o in public)
    if slower:
        saved = _span([o.median for _, o in slower])
        text = f"in {len(slower)} of {len(public)} cases there is something to save, {saved} of a token's time."
        text += _saved([(o, ours) for case, o in slower if (ours := case.best_of_ours("token")) is not None])
    elif unclear:
        text = (
            f"the public form could not be told apart from the unsteered model in {unclear} of {len(public)} cases, so "
            "no saving can be shown there"
        )
        text += "." if unclear == len(public) else "; in the others it is not slower, so there is nothing to save."
    else:
        text = (
            "there is nothing to save that could be measured: even the public form, over the whole width of every "
            "layer, is not slower than the unsteered model."
        )
    if relations := _relations(quiet):
        text += (
            f" Touching fewer activations, by plain indexing, is cheaper in itself in {relations.count('cheaper')} of "
            f"{len(relations)} cases, dearer in {relations.count('dearer')}, not told apart in "
            f"{relations.count('unresolved')}."
        )
    return text


def _saved(best: Sequence[tuple[Overhead, tuple[str, Overhead]]]) -> str:
    """What the best of our paths saves of the public form's time, case by case."""
    cheaper = [(name, ours) for o, (name, ours) in best if ours.compared(o) == "cheaper"]
    free = [name for name, ours in cheaper if ours.verdict in (SAME, FASTER)]
    less = [name for name, ours in cheaper if ours.verdict not in (SAME, FASTER)]
    text = f" The best of our paths saves all of it in {len(free)} of {len(best)}{_named(free)}"
    text += f", part of it in {len(less)}{_named(less)}" if less else ""
    rest = len(best) - len(free) - len(less)
    return (text + f", and a saving is not resolved in {rest}." if rest else text + ".") if best else ""


def _span(percents: Sequence[float], sign: str = "+") -> str:
    least, most = (signed(end, 1).lstrip("" if sign else "+") for end in (min(percents), max(percents)))
    return f"{least} %" if least == most else f"{least} to {most} %"


def _named(names: Sequence[str]) -> str:
    return f" ({', '.join(dict.fromkeys(names))})" if names else ""
