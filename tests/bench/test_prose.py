"""No measured number is written by hand: what stands outside of spans, in prose, is a setting or a definition."""

import re

from bench.files import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

#: What a reader would take for something that was measured.
MEASURED = re.compile(
    r"(?<![\w.=])[-+]?\d[\d,]*(?:\.\d+)?(?:\s*(?:x(?!\s*\d)|%)|\s+(?:times|us|ms|s|seconds?|minutes?|percent|[kMGT]i?B(?:/s)?|"
    r"TFLOP/s|nats|pairs/s|pairs a second|short pairs|tokens/s|tokens a second|us a site))(?!\w)"
    r"|\b(?:two|three|four|five|six|seven|eight|nine|ten|twice|half) (?:times )?as (?:fast|many|much|long|large)\b"
    r"|\b(?:two|three|four|five|six|seven|eight|nine|ten) times\b"
)
#: Settings and definitions that look like it, each of which has to be there.
DEFINITIONS = (
    "miss a goal of 4x the public algorithm",
    "so a goal of 5x is missed",
    "took 2.8 % longer steered than not",
    "its bootstrapped 95 % interval",
    "may differ by more than 2 %, no verdict",
    "narrower than 2 %",
)


def outside(text: str) -> str:
    """The prose: the text without spans, code, comments and the targets of links; line numbers stay."""

    def blank(found: re.Match[str]) -> str:
        return "\n" * found[0].count("\n")

    text = re.sub(r"<!--=.*?<!--/-->", blank, text, flags=re.S)
    text = re.sub(r"<!--.*?-->", blank, text, flags=re.S)
    text = re.sub(r"^(```|~~~).*?^\1[^\n]*$", blank, text, flags=re.S | re.M)
    text = re.sub(r"^(?: {4}|\t)[^\n]*$", "", text, flags=re.M)
    text = re.sub(r"`[^`]*`", blank, text, flags=re.S)
    return re.sub(r"\]\([^)]*\)", "]", text)


def prose() -> dict[str, str]:
    texts = {page.name: outside(page.read_text(encoding="utf-8")) for page in PAGES if page.stem != "efficiency"}
    frame = ROOT / "bench" / "published" / "efficiency.md"
    texts["bench/published/efficiency.md"] = outside(frame.read_text(encoding="utf-8"))
    return {name: " ".join(text.split()) for name, text in texts.items()}


def test_no_measured_number_is_written_by_hand():
    used = set()
    for name, text in prose().items():
        for definition in DEFINITIONS:
            if definition in text:
                used.add(definition)
                text = text.replace(definition, "")
        found = [text[max(m.start() - 40, 0) : m.end() + 20] for m in MEASURED.finditer(text)]
        assert not found, (
            f"{name}: in a span <!--=NAME-->...<!--/--> numbers come from results; outside of one: {found}"
        )
    assert used == set(DEFINITIONS)


LIKE = ("10.0 times as fast", "1.3x", "costs 3 %", "57 us", "31 short pairs", "4.5 pairs/s", "+2.81 nats", "3.0 TB/s")
LIKE += ("took 148 s.", "over four times what", "50 MB at", "twice as fast")


UNLIKE = ("k = 100", "128 pairs", "30 layers", "[3, 5]", "sm_80", "batch 1", "2 cores", "1,024 tokens", "4096 x 4096")


def test_what_looks_measured():
    assert [text for text in (*LIKE, *UNLIKE) if MEASURED.search(text)] == list(LIKE)


def test_prose_is_what_is_outside_of_spans_and_code():
    text = "a 1 x <!--=n-->2 x<!--/--> `3 x` [4](5 x)\n```\n6 x\n```\n<!-- 7 x -->\n    8 x\n9 x"
    assert [found[0] for found in MEASURED.finditer(outside(text))] == ["1 x", "9 x"]
