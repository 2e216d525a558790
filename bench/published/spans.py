"""Generated spans in Markdown: what is between ``<!--=NAME-->`` and ``<!--/-->`` is written here, and by nobody else.

A number stands in its sentence, and may have a format: ``<!--=cpu.demo.seconds:.0f-->148<!--/--> s``. Anything of
several lines is a block: its marks have lines of their own. Nothing is shown of the marks themselves.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

from ..files import ResultsError

_MARK = re.compile(r"<!--(?:=(?P<name>[^\s:>]+)(?::(?P<spec>[^\s>]*))?|(?P<end>/))-->")
_LINE_START = re.compile(r"[ \t>*+\-]*(\d+[.)][ \t]+)?")


def fill(text: str, values: Mapping[str, object], where: str, root: str = "", keep: bool = True) -> str:
    """The text with every span written anew.

    Args:
        values: what the names stand for: numbers, or text, in which ``{root}`` is the way to the repository's root.
        where: the text's file, for errors. root: such as "../" for a file in a folder of the repository.
        keep: whether the marks stay; a file that is made as a whole does without.

    Raises:
        ResultsError: an unknown name, a format that does not fit, or marks out of order; names file and line.
    """
    done, place, opened = [], 0, None
    for mark in _MARK.finditer(text):
        line = f"{where}:{text.count(chr(10), 0, mark.start()) + 1}"
        if mark["end"]:
            if opened is None:
                raise ResultsError(f"{line}: found <!--/--> with no span before it; write <!--=NAME--> where it begins")
            done.append(_content(text, opened, mark, values, where, keep).replace("{root}", root))
            opened, place = None, mark.end()
        elif opened is not None:
            raise ResultsError(f"{line}: found a span inside the span {opened['name']!r}; end that by <!--/--> first")
        else:
            done.append(text[place : mark.start()])
            opened = mark
    if opened is not None:
        line = f"{where}:{text.count(chr(10), 0, opened.start()) + 1}"
        raise ResultsError(f"{line}: found the span {opened['name']!r} without its end; write <!--/--> behind it")
    return "".join([*done, text[place:]])


def _content(
    text: str, start: re.Match[str], end: re.Match[str], values: Mapping[str, object], where: str, keep: bool
) -> str:
    line = f"{where}:{text.count(chr(10), 0, start.start()) + 1}"
    name = start["name"]
    if name not in values:
        near = difflib.get_close_matches(name, values, 5, 0.5)
        alike = near or [n for n in values if n.split(".")[:2] == name.split(".")[:2]] or sorted(values)
        raise ResultsError(
            f"{line}: found the unknown name {name!r}, expected one of the {len(values)} that the results give, "
            f"such as {', '.join(alike)}; bench/published/numbers.py says what there is"
        )
    value = values[name]
    try:
        new = value if isinstance(value, str) and not start["spec"] else format(value, start["spec"] or ".3g")
    except (ValueError, TypeError) as error:
        raise ResultsError(
            f"{line}: {name} = {value!r} does not take the format {start['spec']!r} ({error})"
        ) from error
    before = text[text.rfind("\n", 0, start.start()) + 1 : start.start()]
    block = text[start.end() : start.end() + 1] == "\n"
    if block and before.strip():
        raise ResultsError(f"{line}: found the block {name!r} behind other text; put its marks on lines of their own")
    if block:
        new = f"\n{new}\n"
    elif "\n" in new:
        raise ResultsError(f"{line}: {name} has several lines; put <!--={name}--> and <!--/--> on lines of their own")
    elif _LINE_START.fullmatch(before):
        # CommonMark takes such a line for HTML and shows the rest of it as it is.
        raise ResultsError(f"{line}: found the span {name!r} at the start of a line; wrap the text so that a word is")
    return f"{start[0]}{new}{end[0]}" if keep else new.strip("\n")
