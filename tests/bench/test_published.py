"""What is published: pages and figures agree with the committed results, and conclusions follow from the verdicts."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from markdown_it import MarkdownIt

import synthetic_results as synthetic
from bench.files import ROOT
from bench.published import ResultsError, conclusion, drawings, figures, numbers, spans, write
from bench.published.inference import Inference
from bench.published.load import load

pytest.importorskip("matplotlib")
RESULTS, DOCS, README = ROOT / "bench" / "results", ROOT / "docs", ROOT / "README.md"
PAGES = [README, *sorted(DOCS.glob("*.md"))]
REMEDY = "run `austeer bench report`"


@pytest.fixture
def repository(tmp_path):
    """A copy of what is published, and of what from."""
    shutil.copytree(RESULTS, tmp_path / "bench" / "results")
    shutil.copytree(DOCS, tmp_path / "docs")
    shutil.copy(README, tmp_path)
    return tmp_path


def report(repository: Path, check: bool = False) -> list[str]:
    return write(repository / "bench" / "results", repository / "docs", repository / "README.md", check)


def test_the_committed_pages_and_figures_are_those_of_the_committed_results():
    assert write(RESULTS, DOCS, README, check=True) == [], REMEDY


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_render(page):
    """A mark in the wrong place would make Markdown show a table, or the rest of a paragraph, as it stands."""
    text = page.read_text(encoding="utf-8")
    html = MarkdownIt("commonmark").enable("table").render(text)
    assert html.count("<table>") == len(re.findall(r"^\|[ :|-]+\|$", text, re.M))
    assert "&lt;!--" not in html and "**" not in re.sub(r"<(code|pre)\b.*?</\1>", "", html, flags=re.S)
    for target in re.findall(r'(?:src|srcset|href)="(?!https:)([^"#:]+)', html):
        assert (page.parent / target).exists(), target


def test_everything_is_made_anew_from_nothing(repository):
    before = {p.relative_to(repository): p.read_bytes() for p in (repository / "docs").rglob("*.md")}
    (repository / "docs" / "efficiency.md").unlink()
    shutil.rmtree(repository / "docs" / "figures")
    assert any("efficiency.md: is missing" in line for line in report(repository, check=True))
    assert not (repository / "docs" / "efficiency.md").exists()
    report(repository)
    assert {p.relative_to(repository): p.read_bytes() for p in (repository / "docs").rglob("*.md")} == before
    assert report(repository, check=True) == []


def test_another_result_changes_pages(repository):
    (path,) = (repository / "bench" / "results" / "cpu").glob("momentum-*.json")
    content = json.loads(path.read_text())
    content["sets"][0]["ways"]["ours"]["pairs_a_second"] = 77.7
    path.write_text(json.dumps(content))
    drifted = report(repository, check=True)
    names = {Path(line.split(": ")[0]).name for line in drifted}
    assert names == {"README.md", "momentum.md", "efficiency.md"}
    assert "line" in drifted[0] and "77.7" in drifted[0]
    assert report(repository) == drifted and report(repository) == []
    assert ">78<!--/--> short pairs a second" in (repository / "README.md").read_text()


def test_how_exact_other_engines_are(repository):
    (path,) = (repository / "bench" / "results" / "cpu").glob("serving-*.json")
    content = json.loads(path.read_text())
    row = {"target": "an engine", "operation": "shift", "site": "layer", "difference": 0.00321, "effect": 12.34}
    path.write_text(json.dumps({**content, "rows": [row]}))
    report(repository)
    assert "| an engine | shift | layer | 12.3 | 3.2e-03 | 3e-04 |" in (repository / "docs" / "serving.md").read_text()
    path.unlink()
    report(repository)
    assert "Not measured yet (`make test-engines EXACTNESS=FILE`)" in (repository / "docs" / "serving.md").read_text()


def test_what_a_server_costs(repository):
    results = repository / "bench" / "results" / "cpu"
    for path in results.glob("served-*.json"):
        path.unlink()
    spread = {"median": 1.0123, "low": 0.99, "high": 1.03, "rounds": 3}
    row = {"plans": 8, "seconds": {**spread, "median": 2.5}, "over_vllm": spread}
    content = {"kind": "served", "model": "m", "rounds": 3, "site": "ffn", "aus": 5, "prompt": 16}
    environment = json.loads(next(results.glob("serving-*.json")).read_text())["environment"]
    batches = [{"requests": 8, "tokens": 48, "rows": {"plugin, one plan": row}}]
    content |= {"complete": True, "batches": batches, "environment": environment}
    (results / "served-2000-01-01.json").write_text(json.dumps(content))
    report(repository)
    page = (repository / "docs" / "vllm.md").read_text()
    assert "| 8 | plugin, one plan | 48 | 2.50 | 1.012 [0.990, 1.030] |" in page and "5 AUs a plan at `ffn`" in page


def test_figures_of_results_that_are_gone_go_too(repository):
    kept = sorted((repository / "docs" / "figures").iterdir())
    path = synthetic.put(repository / "bench" / "results", "nvidia-x", "inference-2000-01-01", synthetic.inference())
    report(repository)
    assert len(list((repository / "docs" / "figures").iterdir())) == len(kept) + 1
    path.unlink()
    assert all("no result gives this figure" in line for line in report(repository, check=True)[-1:])
    report(repository)
    assert sorted((repository / "docs" / "figures").iterdir()) == kept


def test_pngs_of_others_stay(tmp_path):
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    foreign, ours, broken = (tmp_path / f"{name}.png" for name in ("foreign", "ours", "broken"))
    for path, key in ((foreign, "Software"), (ours, "Data")):
        info = PngInfo()
        info.add_text(key, "x")
        Image.new("L", (2, 2)).save(path, pnginfo=info)
    broken.write_bytes(b"no PNG")
    before = foreign.read_bytes()
    assert figures.write([], tmp_path, check=False) == [f"{ours}: no result gives this figure any more"]
    assert foreign.read_bytes() == before and broken.exists() and not ours.exists()


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory):
    """Results of every kind: synthetic ones beside the committed."""
    folder = tmp_path_factory.mktemp("results")
    shutil.copytree(RESULTS, folder, dirs_exist_ok=True)
    for old in folder.glob("*/inference-*.json"):
        old.unlink()
    synthetic.put(folder, "cpu", "inference-2000-01-01", synthetic.inference())
    synthetic.put(folder, "cpu", "kernels-2999-01-01", synthetic.kernels())
    for number, name in enumerate(("", "-2")):
        synthetic.put(folder, "nvidia-x", f"inference-2000-01-01{name}", synthetic.inference(f"model-{number}"))
    synthetic.put(folder, "nvidia-x", "dispatch-2000-01-01", synthetic.dispatch())
    return load(folder)


def test_the_document_has_every_section_of_every_machine(every_kind):
    values = numbers.values(every_kind)
    for section in ("conclusion", "overhead", "k", "layers"):
        text = values[f"efficiency.{section}"]
        assert "CPU: Synthetic CPU, 2 cores; synthetic-135M (135M parameters" in text
        assert "model-0" in text and "model-1" in text and "not measured yet" not in text
    assert "not measured yet" in values["efficiency.momentum"]  # on the GPU
    assert "| 4096x4096 | 1 | 1.02 [1.01, 1.03], " in values["efficiency.operations"]
    assert "| steer (1, 576) k=100 cpu | 3.0 | 4.0 | 9.0 |" in values["efficiency.operations"]
    overhead = values["efficiency.overhead"]
    assert "| columns | +0.4 [-0.2, +1.0] same |" in overhead and "repeng: skipped: repeng is not installed" in overhead
    assert "| sparse hook | +0.6 [-0.1, +1.3] same | +1.1 [+0.4, +1.8] slower |" in values["efficiency.k"]
    assert "| memory held, MB |" in overhead and "| 0.03 |" in overhead
    assert values["cpu.inference.synthetic-135m.eager.ffn.b1.k100.l30.p32.public.token"] == pytest.approx(3.1)
    assert values["cpu.inference.synthetic-135m.eager.ffn.b1.k100.l30.p32.public.token.low"] == pytest.approx(2.5)
    head, _, first, *_ = values["efficiency.summary"].splitlines()  # no column in which nothing is
    assert head == "| a decoded token, % | unsteered again | public | dense hook | fold | columns | fused |"
    assert first.startswith("| CPU, synthetic-135M, eager, ffn, scale, k = 100 | +0.1 | +3.1 | +1.9 | +0.0 | +0.4 |")


def test_what_is_not_measured_is_said(tmp_path):
    (tmp_path / "cpu").mkdir()
    values = numbers.values(load(tmp_path))
    for section in ("conclusion", "overhead", "k", "layers", "operations", "momentum", "summary"):
        text = values[f"efficiency.{section}"]
        assert "CPU" in text and "GPU" in text and text.count("not measured yet") == 2


def test_eager_mode_and_graphs_may_be_measured_apart(tmp_path):
    for execution in ("eager", "graph"):
        content = synthetic.inference() | {"cases": [synthetic.case(execution, 1, 100, 30)], "series": {"main": []}}
        content["remark"] = f"a remark on {execution}"
        content["environment"] |= {"code": "one line changed"}
        synthetic.put(tmp_path, "nvidia-x", f"inference-{execution}-2000-01-01", content)
    found = load(tmp_path)
    assert [result.name for result in found] == ["nvidia-x-synthetic-135m-eager", "nvidia-x-synthetic-135m-graph"]
    assert all(len(Inference(result).main()) == 1 for result in found), "what no series names is no sweep's"
    values = numbers.values(found)
    for execution in ("eager", "graph"):
        assert values["efficiency.conclusion"].count(f"; a remark on {execution}\n") == 1
        assert f"nvidia-x.inference.synthetic-135m.{execution}.source" in values
        assert f"nvidia-x.inference.synthetic-135m.{execution}.ffn.b1.k100.l30.p32.fold.token" in values
    assert values["efficiency.machines"].count("0000000000, one line changed") == 2


def test_an_operation_is_named(tmp_path):
    content = synthetic.inference()
    content["cases"].append(synthetic.case("eager", 1, 100, 30) | {"operation": "shift"})
    synthetic.put(tmp_path, "cpu", "inference-2000-01-01", content)
    values = numbers.values(load(tmp_path))
    assert "cpu.inference.synthetic-135m.eager.ffn.shift.b1.k100.l30.p32.fold.token" in values
    assert "Eager, site ffn, shift, k = 100 in 30 layers" in values["efficiency.overhead"]


def sentences(tmp_path, noise: float = 0.6, change=None, **more: tuple[float, float]) -> str:
    """The conclusion. ``change``: is called with each case and its number."""
    content = synthetic.inference(noise=noise, **more)
    for number, case in enumerate(content["cases"]):
        if change is not None:
            change(number, case)
    path = synthetic.put(tmp_path, "cpu", "inference-2000-01-01", content)
    (result,) = load(path.parents[1])
    return "\n".join(conclusion.sentences(Inference(result)))


def test_the_conclusion_where_the_public_form_is_slower_and_fold_is_not(tmp_path):
    text = sentences(tmp_path)
    assert "public is slower than unsteered in 4 of 4 (+3.1 %)" in text
    assert "fold is the same as unsteered in 4 of 4" in text and "fused is slower than unsteered in 4 of 4" in text
    assert (
        "The paper's 2.8 % lies within the public form's interval in 4 of 4; it is of whole task runs on an H100,"
        in text
    )
    assert "in 4 of 4 cases there is something to save, +3.1 % of a token's time" in text
    assert "saves all of it in 4 of 4 (fold)" in text
    assert "by plain indexing, is cheaper in itself in 0 of 4 cases, dearer in 4, not told apart in 0." in text


def test_the_conclusion_where_there_is_nothing_to_save(tmp_path):
    text = sentences(tmp_path, public=(0.1, 0.4), sparse_hook=(0.2, 0.4), dense_hook=(0.1, 0.4))
    assert "there is nothing to save that could be measured" in text and "something to save" not in text
    assert "2.8 % lies within the public form's interval in 0 of 4, above it in 4;" in text
    assert "is cheaper in itself in 0 of 4 cases, dearer in 0, not told apart in 4." in text


def test_the_conclusion_where_touching_fewer_is_cheaper_and_ours_saves_a_part(tmp_path):
    medians = {"public": 9, "dense_hook": 6, "sparse_hook": 2, "fold": 3, "columns": 4}
    text = sentences(tmp_path, **{name: (median, 0.5) for name, median in medians.items()})
    assert "cheaper in itself in 4 of 4 cases, dearer in 0" in text
    assert "all of it in 0 of 4, part of it in 4 (fused)" in text
    assert "below it in 4" in text


def test_what_is_unclear_is_not_called_not_slower(tmp_path):
    wide = dict.fromkeys(("public", "columns", "fused", "fold"), (0.1, 1.5))
    text = sentences(tmp_path, **wide)
    assert "could not be told apart from the unsteered model in 4 of 4 cases, so no saving can be shown there." in text
    assert "not slower" not in text

    def some(number, case):
        if number < 3:
            case["variants"]["public"]["verdict"]["token"] = ("same", "faster", "same")[number]

    text = sentences(tmp_path, change=some, **wide)
    assert "in 1 of 4 cases, so no saving can be shown there; in the others it is not slower" in text


def test_a_path_that_is_the_same_saves_nothing_where_its_interval_meets_the_public_forms(tmp_path):
    """As unsteered by its verdict, but not told apart from the public form either."""
    close = dict.fromkeys(("columns", "fused", "fold"), (0.5, 0.9))
    text = sentences(tmp_path, public=(1.5, 0.8), **close)
    assert "columns is the same as unsteered in 4 of 4" in text and "in 4 of 4 cases there is something to save" in text
    assert "all of it in 0 of 4, and a saving is not resolved in 4." in text


def test_noise_is_what_two_runs_may_differ_by(tmp_path):
    def noisy(number, case):
        if "first_token" in case["noise"]:
            case["noise"]["first_token"], case["verdicts_possible"]["first_token"] = 0.03 + 0.01 * number, False
        if number == 3:
            case["noise"]["token"], case["verdicts_possible"]["token"] = 0.025, False

    text = sentences(tmp_path, change=noisy)
    assert "3 of 4 cases are quiet" in text and "in the other, two unsteered runs may differ by more than 2 %" in text
    assert "**Prefill**: no verdict in any of 2 cases (noise 3.0 to 4.0 %)." in text
    assert "**Prefill, to the first token**" in sentences(tmp_path) and "**Prefill**" not in sentences(tmp_path)


def test_a_noisy_machine_gets_no_verdict(tmp_path):
    text = sentences(tmp_path, noise=3.0)
    assert text.startswith("No verdict: in each of 4 cases two unsteered runs may")
    assert "at best by 3.0 %" in text and "claim" not in text


def test_the_newest_whole_result_counts(tmp_path):
    def put(name: str, **changes):
        return synthetic.put(tmp_path, "cpu", name, synthetic.inference() | changes)

    put("inference-2000-01-09")
    newest = put("inference-2000-01-10")
    newer = put("inference-2000-01-10-2")
    put("inference-2000-01-11", complete=False)
    put("inference-quick-2000-01-12")
    (result,) = load(tmp_path)
    assert result.path == newer and result.complete
    for path in (newer, newest, tmp_path / "cpu" / "inference-2000-01-09.json"):
        path.unlink()
    (result,) = load(tmp_path)
    assert not result.complete and Inference(result).title.endswith("cut off, incomplete")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("other-2000-01-01", {}, r"no known kind.*expected <kind>-<date>.json with one of demo, host"),
        ("host-2000", {}, "no known kind"),
        ("host-2000-01-01", [], "found a result of kind 'list', expected 'host'"),
        ("host-2000-01-01", {"kind": "momentum"}, "found a result of kind 'momentum', expected 'host'"),
        ("host-2000-01-01", {"kind": "host", "sites": 3}, "found no batches, rounds, environment"),
        ("inference-2000-01-01", synthetic.inference() | {"schema": 2}, "found schema 2, expected 1"),
    ],
)
def test_a_result_that_cannot_be_published_is_named(tmp_path, name, content, message):
    path = synthetic.put(tmp_path, "cpu", name, content)
    with pytest.raises(ResultsError, match=rf"^{re.escape(str(path))}: .*{message}"):
        load(tmp_path)


def test_a_damaged_result_and_no_results_are_named(tmp_path):
    with pytest.raises(ResultsError, match="found no folder"):
        load(tmp_path / "none")
    path = synthetic.put(tmp_path, "cpu", "host-2000-01-01", {})
    path.write_text('{"kind": ')
    with pytest.raises(ResultsError, match=r"host-2000-01-01\.json: cannot be read as JSON"):
        load(tmp_path)


VALUES = {"a.number": 2.345, "a.link": "[x]({root}x)", "a.table": "| x |\n| --- |", "b.other": 1}


def fill(text: str, **options) -> str:
    return spans.fill(text, VALUES, "page.md", **options)


def test_spans_are_filled_and_stay():
    text = fill("It is <!--=a.number:.1f-->9<!--/--> x,\nsee <!--=a.link--><!--/-->.", root="../")
    assert text == "It is <!--=a.number:.1f-->2.3<!--/--> x,\nsee <!--=a.link-->[x](../x)<!--/-->."
    assert fill(text, root="../") == text
    assert fill("so\n<!--=a.table-->\nold\n<!--/-->\n") == "so\n<!--=a.table-->\n| x |\n| --- |\n<!--/-->\n"
    assert fill("so\n<!--=a.table-->\n<!--/-->\n", keep=False) == "so\n| x |\n| --- |\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("one\ntwo <!--=a.numbr-->2<!--/-->", r"page\.md:2: found the unknown name 'a\.numbr'.* such as a\.number"),
        (
            "of <!--=zzz-->2<!--/-->",
            r"page\.md:1: found the unknown name 'zzz'.*a\.link, a\.number, a\.table, b\.other",
        ),
        ("of <!--=a.number-->2", "found the span 'a.number' without its end"),
        ("of <!--=a.number-->2 <!--=b.other-->1<!--/-->", "found a span inside the span 'a.number'"),
        ("of 2<!--/-->", "found <!--/--> with no span before it"),
        ("so\n<!--=a.number-->2<!--/--> x", r"page\.md:2: found the span 'a.number' at the start of a line"),
        ("so\n- <!--=a.number-->2<!--/--> x", "at the start of a line"),
        ("of <!--=a.table-->2<!--/-->", "a.table has several lines"),
        ("of <!--=a.table-->\n2\n<!--/-->", "found the block 'a.table' behind other text"),
        ("of <!--=a.number:d-->2<!--/-->", r"a\.number = 2\.345 does not take the format 'd'"),
        ("of <!--=a.link:.1f-->2<!--/-->", "does not take the format"),
    ],
)
def test_spans_that_cannot_be_filled(text, message):
    with pytest.raises(ResultsError, match=message):
        fill(text)


def test_every_figure_is_drawn_whole(every_kind, tmp_path):
    """Nothing reaches over the edge, and the ground is light, whatever page it lies on."""
    from PIL import Image

    wanted = {figure.drawing: figure for figure in [*figures.figures(every_kind), *figures.figures(load(RESULTS))]}
    assert set(wanted) == {"overheads", "bars", "ratios"}
    for figure in wanted.values():
        drawn = drawings.make(figure.drawing, figure.data)
        path = tmp_path / "figure.png"
        drawn.savefig(path)  # lays it out
        box, size = drawn.get_tightbbox(), drawn.get_size_inches()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= size[0] and box.y1 <= size[1], (figure.name, box)
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L"))
        assert pixels[0, 0] > 200 and 0.01 < (pixels < pixels[0, 0] - 100).mean() < 0.5


def test_the_committed_figures_are_what_is_drawn_today(tmp_path):
    """Pixels are compared only where the same matplotlib drew them; the data always (the first test)."""
    import matplotlib
    from PIL import Image

    for figure in {figure.drawing: figure for figure in figures.figures(load(RESULTS))}.values():
        new = tmp_path / "figure.png"
        figures.draw(figure, new)
        with Image.open(figure.file(DOCS / "figures")) as old, Image.open(new) as image:
            if matplotlib.__version__ not in old.info["Software"]:
                pytest.skip(f"drawn by {old.info['Software']}")
            assert old.size == image.size, f"{figure.name}: count up _DRAWN in bench/published/figures.py; {REMEDY}"
            difference = np.abs(np.asarray(old.convert("L"), int) - np.asarray(image.convert("L"), int))
        # A digit is more than this share of the pixels; what rounding moves is less, and fainter.
        assert (difference > 64).mean() < 2e-5, (
            f"{figure.name}: count up _DRAWN in bench/published/figures.py, and {REMEDY}"
        )
