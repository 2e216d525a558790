"""Tables that keep every name and value whole: what is too wide for the terminal goes on in a further table below."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

#: Standard output, as commands print to it: lines of text are left to the terminal to break.
console = Console(highlight=False, soft_wrap=True)

#: Blanks between two columns; one where all of them fit so.
GAP = 2

#: A column of words, or a heading, is made no narrower than this for the sake of other columns.
NARROW = 20


def show_table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    prose: Collection[int] = (),
    right: bool = False,
    on: Console = console,
) -> None:
    """Prints a table without lines; its cells are plain text, not markup.

    The first columns, as many as tell the rows apart, are repeated where a table goes on below.

    Args:
        prose: further columns of words. Words and names may be broken into lines, values never are.
        right: whether values are put to the right, under each other.
        on: where it is printed; by default the commands' console.
    """
    for number, part in enumerate(fitting(headings, rows, on.width, prose=prose, right=right)):
        if number:
            on.print()
        on.print(part, soft_wrap=False)


def signed(value: float, digits: int) -> str:
    """With a sign and so many decimals; what is rounded to zero is "+0.0", however small it is below."""
    return f"{round(value, digits) + 0.0:+.{digits}f}"  # -0.0 + 0.0 is 0.0


def fitting(
    headings: Sequence[str],
    rows: Sequence[Sequence[str | Text]],
    width: int,
    *,
    prose: Collection[int] = (),
    right: bool = False,
) -> Iterator[Table]:
    """The parts of a table, each at most so many characters wide; see :func:`show_table`."""
    texts = [[Text(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    names = _names([[cell.plain for cell in row] for row in texts])
    words = {*range(names), *prose}
    cells = [_wide([row[at].plain for row in texts]) for at in range(len(headings))]
    natural = [max(cell, cell_len(heading)) for cell, heading in zip(cells, headings)]
    least, gap = natural, 1 if 1 <= _total(natural, GAP) - width < len(natural) else GAP
    if _total(natural, gap) > width:
        least = [
            _least_of_words([heading, *(row[at].plain for row in texts)], natural[at], width // (names + 2))
            if at in words
            else _least_of_values(heading, cells[at])
            for at, heading in enumerate(headings)
        ]
    for part in _parts(least, names, width, gap):
        table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0))
        for at, room in zip(part, _widths(part, least, natural, words, width, gap)):
            justify: JustifyMethod = "right" if right and at not in words else "left"
            heading = headings[at] if cell_len(headings[at]) <= room else _broken(headings[at], room)
            table.add_column(Text(heading), justify=justify, width=room, overflow="fold")
        for row in texts:
            table.add_row(*(row[at] for at in part))
        yield table


def _wide(cells: Sequence[str]) -> int:
    return max((cell_len(line) for cell in cells for line in cell.splitlines()), default=0)


def _total(widths: Sequence[int], gap: int) -> int:
    return sum(widths) + gap * (len(widths) - 1)


def _names(rows: Sequence[Sequence[str]]) -> int:
    """How many of the first columns tell the rows apart; 1 where none do."""
    for count in range(1, len(rows[0]) if rows else 1):
        if len({tuple(row[:count]) for row in rows}) == len(rows):
            return count
    return 1


def _least_of_words(cells: Sequence[str], natural: int, most: int) -> int:
    """Words stay whole up to so many characters."""
    longest = _wide([word for cell in cells for word in cell.split()])
    return min(natural, most, max(NARROW, longest))


def _least_of_values(heading: str, cells: int) -> int:
    return max(cells, min(NARROW, _wide(heading.split())))


def _parts(least: Sequence[int], names: int, width: int, gap: int) -> Iterator[list[int]]:
    """The numbers of the columns of each part."""
    part = list(range(names))
    for at in range(names, len(least)):
        if len(part) > names and _total([least[i] for i in (*part, at)], gap) > width:
            yield part
            part = list(range(names))
        part.append(at)
    yield part


def _widths(
    part: Sequence[int], least: Sequence[int], natural: Sequence[int], words: Collection[int], width: int, gap: int
) -> list[int]:
    """What each column gets: at least what it needs, and of the rest what its words can use, the narrowest first."""
    widths = {at: max(least[at], 1) for at in part}
    rest = width - _total(list(widths.values()), gap)
    widths[part[-1]] += min(rest, 0)  # one value that is wider than the terminal has to be broken
    open_ = [at for at in part if at in words and widths[at] < natural[at]]
    while rest > 0 and open_:
        at = min(open_, key=lambda at: widths[at])
        widths[at] += 1
        rest -= 1
        open_ = [at for at in open_ if widths[at] < natural[at]]
    return [widths[at] for at in part]


def _broken(heading: str, room: int) -> str:
    return "\n".join(textwrap.wrap(heading, room))
