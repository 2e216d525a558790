"""The model card: what it says is the plan's, what it shows can be run, and what is not known is not claimed."""

import json
import re
import shlex
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from austeer.models.sites import Fingerprint
from austeer.plans import card as card_module
from austeer.plans.card import model_card
from austeer.plans.evidence import Evidence, Outcome, Overhead
from austeer.plans.serving import VLLM_RANKS
from austeer.plans.table import RANKS, STEPS
from austeer.vllm.sets import parse
from small_plans import DOSED, EVIDENCE, KNOWN, MODEL, PLAN, plan_of

HUB_MODEL = replace(MODEL, name="HuggingFaceTB/SmolLM2-135M-Instruct")


def table(card, first):
    """The rows of the table whose first heading is ``first``, as lists of cells."""
    lines = card.text.splitlines()
    start = next(i for i, line in enumerate(lines) if re.match(rf"\| {first} \|", line))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def commands(card):
    """The shell commands of the examples, in words."""
    blocks = re.findall(r"```sh\n(.*?)\n```", card.text, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def python_of(card):
    return re.search(r"```python\n(.*?)```", card.text, re.DOTALL).group(1)


# --- what the plan is ------------------------------------------------------------------------------------------------


def test_metadata():
    card = model_card(replace(KNOWN, model=HUB_MODEL), "user/kind", license="apache-2.0")
    again = ModelCard(str(card))
    assert again.data.to_dict() == card.data.to_dict() == {
        "base_model": HUB_MODEL.name,
        "base_model_relation": "adapter",
        "library_name": "austeer",
        "license": "apache-2.0",
        "tags": ["austeer", "activation-steering"],
    }  # fmt: skip


@pytest.mark.parametrize("name", ["SmolLM2-135M-Instruct", "user/model – ü", "a/b/c", "user/x@main", "Llama"])
def test_no_base_model_is_claimed_that_is_no_name_on_the_hub(name):
    card = model_card(replace(PLAN, model=replace(MODEL, name=name)), "user/kind")
    assert card.data.to_dict() == {"library_name": "austeer", "tags": ["austeer", "activation-steering"]}
    assert f"{name} (not a name on the Hub)" in card.text and "https://huggingface.co/" not in card.text


def test_facts():
    plan = replace(PLAN, model=HUB_MODEL, operation="shift", ties="public", chat_template=True)
    card = model_card(plan, "user/kind")
    facts = {row[0]: row[1] for row in table(card, "") if len(row) == 2}
    assert facts == {
        "model": f"[{HUB_MODEL.name}](https://huggingface.co/{HUB_MODEL.name})",
        "revision": "abc123",
        "architecture": "llama, 4 layers",
        "site attention": "1 AU in 1 layer (from 0): 0",
        "site ffn": "2 AUs in 2 layers (from 0): 0, 3",
        "operation": r"shift: an AU's activation x becomes x + alpha \* delta",
        "k": "3 AUs",
        "ranked by": "the size of beta: on how many pairs an AU is larger on one side (the paper's)",
        "pairs": "17",
        "ties": "by layer, then index, as in the paper's public code",
        "chat template": "the prompts went through a chat template",
    }
    assert card.text.strip().startswith("# kind\n")
    assert "revision | not known" in str(model_card(replace(plan, model=replace(HUB_MODEL, revision=None))))


def test_a_plan_by_effect_with_its_dose():
    card = model_card(replace(DOSED, model=HUB_MODEL), "user/kind")
    facts = {row[0]: row[1] for row in table(card, "") if len(row) == 2}
    assert facts["ranked by"].startswith("what a shift does to the wanted log-odds")
    assert "delta: the shift at alpha = 1" in card.text and "Newton's step" in card.text
    assert table(card, "alpha") == [
        ["0.408", "0.0167", "", "+0.24"],
        ["0.5", "0.025", "0.03", "+0.30"],
        ["0.645", "0.0417", "", "+0.39"],
        ["0.913", "0.0833", "", "+0.55"],
    ]
    assert "standard error of 10%" in card.text and "kl=0.1)" in python_of(card)
    words = next(words for words in commands(card) if "generate" in words)
    assert words[words.index("--kl") + 1] == "0.1" and "--alpha" not in words
    sets = next(words[-1] for words in commands(card) if words[:2] == ["austeer", "serve"])
    assert json.loads(sets)["sets"]["kind"]["alpha"] == pytest.approx(DOSED.dose.alpha(0.1), rel=1e-3)
    tested = DOSED.with_evidence(Evidence("effect", tested=(Outcome(3, "text", 1.0),), alpha=3))
    assert "alpha=3)" in python_of(model_card(tested)), "what was tested comes first"
    assert set(card_module.RANKS) == set(RANKS) and set(card_module.STEPS) == set(STEPS)
    still = DOSED.with_dose(replace(DOSED.dose, kl=(0.0, 0.0, 0.0), measured=()))
    assert "## Dose" not in model_card(still).text and "alpha=1)" in python_of(model_card(still))


def test_many_layers_are_shortened():
    model = replace(MODEL, layers=13)
    for layers, end in ((12, ", 11"), (13, ", 11 ...")):
        facts = table(model_card(plan_of([("ffn", layer, 0) for layer in range(layers)], model=model)), "")
        assert next(row[1] for row in facts if row[0] == "site ffn").endswith(end)


def test_the_most_important_aus():
    rows = table(model_card(PLAN), "site")
    assert [row[:3] for row in rows] == [[site, str(layer), str(index)] for site, layer, index in PLAN.keys()]  # noqa: SIM118
    assert [float(row[3]) for row in rows] == pytest.approx(PLAN.beta.tolist(), abs=1e-3)
    assert [float(row[4]) for row in rows] == pytest.approx(PLAN.delta.tolist(), rel=1e-3)
    assert "The AUs, most important first:" in model_card(PLAN).text
    wide = plan_of([("ffn", layer, index) for layer in range(4) for index in range(9)])
    card = model_card(wide)
    assert len(table(card, "site")) == 10 and "The 10 most important AUs:" in card.text


# --- what is known of it ---------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_evidence():
    card = model_card(KNOWN)
    assert "Tested with alpha 2 to 4. Start with alpha 4." in card.text
    assert "Effect: mean change of log-odds, nats. Side effect: rise of the cross-entropy, nats a token." in card.text
    assert table(card, "alpha") == [
        ["2", "9 pairs", "+0.5", "", "+0.01"],
        ["4", "9 pairs", r"+0.9 \[+0.6, +1.2\]", "100%", "+0.04"],
    ]
    assert table(card, "path") == [["fold", "float32, batch 1", "Xeon, 2 cores", r"+0.4 % \[-1.2, +2.1\]"]]
    assert "Not tested" not in card.text and "Not measured" not in card.text


@pytest.mark.parametrize(
    "evidence, tested, measured",
    [
        (None, False, False),
        (Evidence(), False, False),
        (replace(EVIDENCE, overhead=()), True, False),
        (replace(EVIDENCE, tested=(), alpha=None), False, True),
    ],
)
def test_nothing_is_invented(evidence, tested, measured):
    card = model_card(PLAN.with_evidence(evidence))
    assert ("Not tested: no strength was tried" in card.text) is not tested
    assert ("Not measured." in card.text) is not measured
    figures = re.findall(r"[+-]\d[\d.]* %|nats", card.text)
    assert bool(figures) is (tested or measured)


def test_alpha_of_each_site():
    rows = tuple(Outcome({"attention": a, "ffn": 0.5}, "text", 1) for a in (4, 8))
    plan = PLAN.with_evidence(Evidence("effect", tested=rows, alpha={"attention": 8, "ffn": 0.5}))
    card = model_card(plan)
    assert "Tested with alpha attention 4 to 8; ffn 0.5. Start with alpha attention 8, ffn 0.5." in card.text
    assert 'alpha={"attention": 8.0, "ffn": 0.5}' in python_of(card)
    assert all("ALPHA" in words for words in commands(card) if "--alpha" in words), "commands take one number"


# --- how to use it ---------------------------------------------------------------------------------------------------


def test_the_python_of_the_card_runs(demo, tmp_path, monkeypatch, capsys):
    model = Fingerprint("llama", 30, {"attention": 576}, "HuggingFaceTB/SmolLM2-135M-Instruct", None)
    plan = plan_of([("attention", 12, 5), ("attention", 3, 575)], "shift", model=model)
    plan = plan.with_evidence(Evidence("effect", tested=(Outcome(3, "text", 1.0),), alpha=3))
    plan.save_pretrained(tmp_path / "user" / "kind")
    code = python_of(model_card(plan, "user/kind"))
    assert f'name = "{plan.model.name}"' in code and "alpha=3)" in code
    monkeypatch.chdir(tmp_path)
    for index, kind in enumerate(("AutoModelForCausalLM", "AutoTokenizer")):
        monkeypatch.setattr(f"transformers.{kind}.from_pretrained", lambda name, part=demo[index]: part)
    exec(code.replace("max_new_tokens=40", "max_new_tokens=2"), {})
    assert capsys.readouterr().out.startswith("The weekend trip was")


@pytest.mark.parametrize("chat", [False, True])
def test_the_commands_of_the_card_are_those_of_the_command_line(chat):
    from austeer.cli.generate import generate

    plan = replace(KNOWN, model=HUB_MODEL, chat_template=chat)
    words = commands(model_card(plan, "user/kind"))[0]
    assert words[:3] == ["austeer", "generate", "user/kind"]
    options = dict(zip(words[3::2], words[4::2])) if not chat else None
    if options is not None:
        assert options == {"--model": HUB_MODEL.name, "--alpha": "4", "--prompt": "The weekend trip was"}
    assert ("--chat" in words) is chat
    known = set(generate.__annotations__)
    assert {word[2:] for word in words if word.startswith("--")} <= known


def test_served_as_a_lora_where_that_is_exact():
    from austeer.cli.export import lora

    card = model_card(replace(KNOWN, model=HUB_MODEL), "user/kind")
    export, serve = commands(card)[1:]
    assert export == [
        *("austeer", "export", "lora", "user/kind", "--model", HUB_MODEL.name),
        *("--alpha", "4", "--out", "kind-lora"),
    ]
    assert serve == ["vllm", "serve", HUB_MODEL.name, "--enable-lora", "--lora-modules", "kind=kind-lora"]
    assert {word[2:] for word in export if word.startswith("--")} <= set(lora.__annotations__)
    assert "a LoRA adapter of rank 1," in card.text


def test_ablation_is_an_adapter_of_a_rank_for_each_site_of_a_layer():
    model = replace(HUB_MODEL, widths={"attention": 9, "ffn": 1024, "neuron": 1024})
    keys = [("ffn", 2, i) for i in range(40)] + [("neuron", 2, 0), ("attention", 2, 0), ("ffn", 1, 3)]
    card = model_card(plan_of(keys, "ablate", model=model), "user/kind")
    assert "a LoRA adapter of rank 2," in card.text and "ablate: an AU's activation x becomes x - alpha" in card.text
    assert "--max-lora-rank" not in commands(card)[2]


@pytest.mark.parametrize(
    "count, rank, allowed", [(16, 16, None), (17, 17, "32"), (65, 65, "128"), (512, 512, "512"), (513, 513, None)]
)
def test_the_rank_that_the_server_is_told(count, rank, allowed):
    model = replace(HUB_MODEL, widths={"attention": 9, "ffn": 1024, "neuron": 1024})
    keys = [("ffn", 2, i) for i in range(count - 3)] + [("neuron", 2, i) for i in range(3)] + [("attention", 2, 0)]
    card = model_card(plan_of(keys, model=model), "user/kind")
    export, serve = commands(card)[1:]
    assert f"LoRA {'adapter ' if count <= VLLM_RANKS[-1] else ''}of rank {rank}" in card.text
    if count > VLLM_RANKS[-1]:
        assert export[:3] == ["austeer", "export", "checkpoint"] and serve == ["vllm", "serve", "kind-folded"]
    elif allowed is None:
        assert "--max-lora-rank" not in serve
    else:
        assert serve[-2:] == ["--max-lora-rank", allowed]


@pytest.mark.parametrize(
    "operation, site, why",
    [
        ("push", "ffn", "`push` is not linear"),
        ("shift", "attention", "`shift` adds a constant"),
        ("scale", "layer", "no weights make the output of a whole decoder layer"),
        ("ablate", "layer", "no weights make the output of a whole decoder layer"),
    ],
)
def test_served_by_the_plugin_where_a_lora_cannot(operation, site, why):
    model = replace(HUB_MODEL, widths={site: 9})
    plan = plan_of([(site, 0, 0)], operation, model=model).with_evidence(EVIDENCE)
    card = model_card(plan, "user/kind")
    assert why in card.text and "lora" not in card.text.replace("LoRA", "")
    *serve, sets = commands(card)[1]
    assert json.loads(sets) == {"sets": {"kind": {"plan": "user/kind", "alpha": 4}}}
    assert list(parse(sets).named) == ["kind"]
    assert serve == ["austeer", "serve", HUB_MODEL.name, "--sets"]


# --- strangers' texts ------------------------------------------------------------------------------------------------


EVIL = "x | y](http://evil) <script>`rm -rf /` $(reboot) '; reboot #*_~&amp;"


def test_names_cannot_change_the_card():
    model = replace(MODEL, name=EVIL, model_type=EVIL, revision=EVIL, widths={EVIL: 9, **MODEL.widths})
    evidence = replace(EVIDENCE, effect=EVIL, side_effect=EVIL, tested=(replace(EVIDENCE.tested[1], data=EVIL),))
    evidence = replace(evidence, overhead=(Overhead(1, EVIL, EVIL, EVIL),))
    card = model_card(plan_of([(EVIL, 0, 0), ("ffn", 1, 1)], model=model).with_evidence(evidence), "user/kind")
    assert "base_model" not in card.data.to_dict()
    tokens = MarkdownIt().enable(["table", "strikethrough"]).parse(card.text)
    inline = [child for token in tokens if token.type == "inline" for child in token.children]
    kinds = {token.type for token in [*tokens, *inline]}
    assert "table_open" in kinds and not kinds & {"html_block", "html_inline", "link_open", "image", "s_open"}
    texts = ["".join(child.content for child in token.children) for token in tokens if token.type == "inline"]
    assert sum(text == EVIL for text in texts) == 6 and sum(EVIL in text for text in texts) == 11, "shown as it is"
    for words in commands(card):
        assert EVIL in words, "quoted as one word"
    compile(python_of(card), "card", "exec")
    assert f"name = {json.dumps(EVIL)}" in python_of(card)


def test_a_title_without_a_repository():
    assert model_card(replace(PLAN, model=HUB_MODEL)).text.strip().startswith(f"# A steering plan for {HUB_MODEL.name}")
    assert commands(model_card(PLAN))[0][2] == "FOLDER"
