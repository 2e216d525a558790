"""Draws docs/figures/architecture.svg and writes the layers into docs/architecture.md: python docs/architecture.py.

Rows are those of .importlinter, captions the packages' docstrings, and arrows the imports as they are, less those that
follow from others.
"""

import ast
import configparser
import itertools
import random
import re
import sys
import textwrap
from html import escape
from pathlib import Path
from statistics import fmean

import grimp

ROOT = Path(__file__).resolve().parents[1]
FIGURE, PAGE = ROOT / "docs" / "figures" / "architecture.svg", ROOT / "docs" / "architecture.md"
BENCH, KERNELS = "bench", "austeer_kernels"
WIDTH, WIDEST, GAP, WIRE, BETWEEN, LINE, LETTER, TRIES, SWEEPS = 800, 200, 12, 4, 36, 14, 6.3, 40, 8
#: Boxes are light with dark text, and arrows grey, so that both a light and a dark page can lie behind them.
FILL, FILLS = "#e8f0fd", {BENCH: "#fff1d6", KERNELS: "#dcf3e0"}
HEAD = """<style>text{font:11px sans-serif;fill:#1f2328;text-anchor:middle}.name{font:bold 13px sans-serif}
path{fill:none;stroke:#8b949e;stroke-width:1.5}#head path{fill:#8b949e;stroke:none}</style>
<marker id="head" viewBox="0 0 8 8" refX="1" refY="4" markerWidth="5" markerHeight="5" orient="auto">
<path d="M0 0L8 4L0 8z"/></marker>"""

#: For each row, pairs of what is in it and what in the next.
Ways = list[list[tuple[str, str]]]
#: Middle and width of a thing in a row.
Place = tuple[float, float]


def layers() -> list[str]:
    """The packages of the contract, those that import first."""
    contract = configparser.ConfigParser()
    contract.read(ROOT / ".importlinter", encoding="utf-8")
    return re.findall(r"\w+", contract["importlinter:contract:packages"]["layers"])


def imports() -> dict[str, set[str]]:
    """Which packages each imports; ``austeer`` itself, which only names the public verbs, is left out."""
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    graph = grimp.build_graph("austeer", KERNELS, BENCH, cache_dir=None)
    found: dict[str, set[str]] = {name: set() for name in (BENCH, *layers(), KERNELS)}
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            a, b = (re.sub(r"\..*", "", name.removeprefix("austeer.")) for name in (module, imported))
            if a != b and {a, b} <= set(found):
                found[a].add(b)
    return found


def rows(found: dict[str, set[str]]) -> list[list[str]]:
    """The contract's order, the kernels after what imports them; a row ends before a package that it imports."""
    order = [BENCH, *layers()]
    order.insert(max(order.index(name) for name in order if KERNELS in found[name]) + 1, KERNELS)
    cut: list[list[str]] = [[]]
    for name in order:
        if any(name in found[other] for other in cut[-1]):
            cut.append([])
        cut[-1].append(name)
    return cut


def caption(name: str) -> str:
    """The first line of a package's docstring."""
    paths = [ROOT / root / name / "__init__.py" for root in ("", "kernels", "austeer")]
    path = next((path for path in paths if path.exists()), ROOT / "austeer" / f"{name}.py")
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0].replace("`", "")


def ways(found: dict[str, set[str]]) -> Ways:
    """For each row what is linked with what in the next: boxes, and wires (``> package``), one for all to a package."""
    number = {name: n for n, names in enumerate(rows(found)) for name in names}

    def below(name: str) -> set[str]:
        return found[name].union(*map(below, found[name]))

    links: list[set[tuple[str, str]]] = [set() for _ in rows(found)]
    for name in found:
        for target in found[name] - set().union(*map(below, found[name])):
            way = [name, *[f"> {target}"] * (number[target] - number[name] - 1), target]
            for n, link in enumerate(itertools.pairwise(way), number[name]):
                links[n].add(link)
    return [sorted(link) for link in links]


def side_by_side(want: dict[str, float], boxes: int) -> dict[str, Place]:
    """Places in one row, from left to right by the middles that are wanted, and as near to them as there is room."""
    box = min(WIDEST, (WIDTH - WIRE * (len(want) - boxes) - GAP * (len(want) - 1)) / boxes)
    names = sorted(want, key=lambda name: want[name])
    sizes = [WIRE if name[0] == ">" else box for name in names]
    steps = [0.0, *itertools.accumulate((a + b) / 2 + GAP for a, b in itertools.pairwise(sizes))]
    low, high = sizes[0] / 2, WIDTH - sizes[-1] / 2 - steps[-1]
    # Less its step, a middle may be anywhere but before the one on its left.
    free = [want[name] - step for name, step in zip(names, steps)]
    up, down = itertools.accumulate(free, max), list(itertools.accumulate(free[::-1], min))[::-1]
    middles = [min(max((a + b) / 2, low), high) + step for a, b, step in zip(up, down, steps)]
    return dict(zip(names, zip(middles, sizes)))


def placed(cut: list[list[str]], links: Ways) -> list[dict[str, Place]]:
    """Middle and width of all in each row, near what it is linked to: of some tries the one of fewest crossings."""
    choose, tries = random.Random(0), []
    full = [[*names, *sorted({b for _, b in above if b[0] == ">"})] for names, above in zip(cut, [[], *links])]
    for number in range(TRIES):
        found = [{name: (choose.random() * WIDTH, 0.0) for name in names} for names in full]
        for n in [*range(len(full)), *range(len(full))[::-1]] * SWEEPS:
            near: dict[str, list[float]] = {name: [] for name in full[n]}
            for a, b in links[n]:
                near[a].append(found[n + 1][b][0])
            for a, b in links[n - 1] if n else ():
                near[b].append(found[n - 1][a][0])
            found[n] = side_by_side({a: fmean(near[a] or found[n][a][:1]) for a in full[n]}, len(cut[n]))
        lines = [[(found[n][a][0], found[n + 1][b][0]) for a, b in link] for n, link in enumerate(links)]
        pairs = [pair for row in lines for pair in itertools.combinations(row, 2)]
        crossings = sum((a - c) * (b - d) < 0 for (a, b), (c, d) in pairs)
        tries.append((crossings, sum(abs(a - b) for row in lines for a, b in row), number, found))
    return min(tries)[-1]


def svg(found: dict[str, set[str]]) -> str:
    """The figure."""
    links = ways(found)
    places = placed(rows(found), links)
    boxes, arrows, spans, y = [], [], [], 1
    for row in places:
        words = {n: textwrap.wrap(caption(n), int(s / LETTER)) for n, (_, s) in row.items() if n[0] != ">"}
        height = 26 + LINE * max(map(len, words.values()))
        for name, text in words.items():
            x, size = row[name]
            shape = f'x="{x - size / 2:.0f}" y="{y}" width="{size:.0f}" height="{height}" rx="6"'
            boxes.append(f'<rect {shape} fill="{FILLS.get(name, FILL)}"/>')
            boxes.append(f'<text class="name" x="{x:.0f}" y="{y + 17}">{name}</text>')
            boxes += [f'<text x="{x:.0f}" y="{y + 32 + LINE * i}">{escape(line)}</text>' for i, line in enumerate(text)]
        spans.append((y, y + height))
        y += height + BETWEEN
    for n, a, b in ((n, a, b) for n, link in enumerate(links) for a, b in link):
        at, to, start, end = places[n][a][0], places[n + 1][b][0], spans[n][1], spans[n + 1][0]
        rest = f'V{spans[n + 1][1]}"' if b[0] == ">" else f'V{end - 6}" marker-end="url(#head)"'
        turn = (start + end - 8) // 2
        arrows.append(f'<path d="M{at:.0f} {start}C{at:.0f} {turn} {to:.0f} {turn} {to:.0f} {end - 8}{rest}/>')
    size = f'viewBox="0 0 {WIDTH} {y - BETWEEN + 1}" width="{WIDTH}"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', HEAD, *arrows, *boxes, "</svg>", ""])


def page(found: dict[str, set[str]], text: str) -> str:
    """The page with the list of rows in its place."""
    lines = "\n".join(f"{n}. {', '.join(f'`{name}`' for name in row)}" for n, row in enumerate(rows(found), 1))
    return re.sub(r"(<!-- layers -->\n).*?(<!-- end -->)", rf"\g<1>{lines}\n\g<2>", text, flags=re.DOTALL)


if __name__ == "__main__":
    packages = imports()
    FIGURE.write_text(svg(packages), encoding="utf-8")
    PAGE.write_text(page(packages, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
