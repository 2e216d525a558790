"""docs/architecture.md: its figure and list are those of the code, and what it names is there."""

import contextlib
import importlib.util
import pkgutil
import re

import pytest

from places import ROOT

REMEDY = "run python docs/architecture.py"


@pytest.fixture(scope="module")
def architecture():
    """The program that draws the figure; docs/ is no package."""
    spec = importlib.util.spec_from_file_location("architecture", ROOT / "docs" / "architecture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def imports(architecture):
    return architecture.imports()


@pytest.fixture(scope="module")
def page(architecture):
    return architecture.PAGE.read_text(encoding="utf-8")


def test_the_figure_is_that_of_the_imports(architecture, imports):
    assert architecture.FIGURE.read_text(encoding="utf-8") == architecture.svg(imports), REMEDY


def test_the_list_is_that_of_the_contract(architecture, imports, page):
    assert page == architecture.page(imports, page), REMEDY
    listed = re.findall(
        r"^\d+\. (`.+`)$", page.partition("<!-- layers -->")[2].partition("<!-- end -->")[0], re.MULTILINE
    )
    names = re.findall(r"`(\w+)`", " ".join(listed))
    assert [name for name in names if name not in ("bench", "austeer_kernels")] == architecture.layers()


def test_no_arrow_goes_up_and_every_package_has_a_caption(architecture, imports):
    rows = architecture.rows(imports)
    row = {name: number for number, names in enumerate(rows) for name in names}
    assert all(row[name] < row[other] for name, below in imports.items() for other in below)
    assert [name for name in row if not architecture.caption(name)] == []


def test_every_import_is_an_arrow_or_follows_from_arrows(architecture, imports):
    arrows = {name: set() for name in imports}
    links = architecture.ways(imports)
    for n, row in enumerate(links):
        for a, b in row:
            if not a.startswith("> "):
                target, step = b, n
                while target.startswith("> "):
                    step += 1
                    (target,) = {after for before, after in links[step] if before == target}
                arrows[a].add(target)

    def reached(name):
        return arrows[name].union(*map(reached, arrows[name]))

    assert all(below <= reached(name) for name, below in imports.items())
    for name, targets in arrows.items():
        assert targets <= imports[name], "an arrow that is no import"
        for target in targets:
            assert not any(target in reached(other) for other in targets - {target}), (
                "an arrow that follows from others"
            )


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("austeer", "bench", "docs", "kernels", "tests")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_names_no_file_that_is_not_there(path):
    text = path.read_text(encoding="utf-8")
    words = re.findall(r"`([\w./-]+)`", text)
    if path.name in ("architecture.md", "CONTRIBUTING.md"):  # elsewhere a path may be a user's
        named = [word for word in words if ("/" in word and word.islower()) or word.endswith(".py")]
    else:
        named = [word for word in words if word.startswith(tuple(f"{folder}/" for folder in FOLDERS))]
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    roots = (ROOT, ROOT / "austeer")
    assert [name for name in named if not any((root / name).exists() for root in roots)] == []
    assert [link for link in links if not (path.parent / link).exists()] == []
    assert named or path.name != "architecture.md"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_names_nothing_of_austeer_that_is_not_there(path):
    for name in re.findall(r"(?<![\w/.])(austeer(?:\.[A-Za-z_]\w*)+)\b(?!/)", path.read_text(encoding="utf-8")):
        if name != "austeer.json":  # a file that exports write
            assert resolved(name), f"{path.name} names {name}"


def resolved(name):
    """What a dotted name stands for: a module, also one that needs a package that is absent, or what is in one."""
    with contextlib.suppress(ImportError):
        if spec := importlib.util.find_spec(name):
            return spec
    with contextlib.suppress(ImportError, AttributeError):
        return pkgutil.resolve_name(name)
    return None
