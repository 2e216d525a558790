"""The vLLM plugin while the engine runs: plans come and go, strengths are each request's, the prefix cache stays on."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import austeer
from austeer.plans.dose import Dose
from austeer.plans.serving import ALPHA, KEY, KL, VARIABLE
from dense_formula import random_plan
from mixes import PROMPTS
from plugin_sets import ENGINE, run_in_process
from run_time import BLOCK, LONG, SLOTS, TOKENS, ask, hits, plan_beside, put_off, single_tokens
from small_models import small_model

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def small(demo, tmp_path_factory):
    return small_model("llama", demo[1], tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def plans(small) -> dict[str, austeer.Plan]:
    """Three plans, of which one has a dose."""
    model, _ = small
    found = {name: random_plan(model, "attention", 12, "shift", seed) for seed, name in enumerate(("kind", "brief"))}
    found["brief"] = found["brief"].with_dose(Dose(tuple(0.05 * (k + 1) for k in range(12))))
    found["praise"] = random_plan(model, "layer", 6, "scale", 3)
    return found


@pytest.fixture(scope="module")
def write(small, demo):
    """``write(plans, scope)``: what the model writes after LONG with (plan, alpha)s, as Transformers runs it."""
    model, tokenizer = small[0], demo[1]
    ids = tokenizer(LONG, return_tensors="pt")

    def made(parts, scope="all"):
        with austeer.steer(model, sum_of(parts), alpha=strengths(parts), scope=scope):
            output = model.generate(**ids, min_new_tokens=TOKENS, max_new_tokens=TOKENS, do_sample=False)
        return output[0][ids["input_ids"].shape[1] :].tolist()

    def sum_of(parts):
        first, *rest = (plan for plan, _ in parts)
        return sum(rest, first)

    def strengths(parts):
        alphas = {alpha for _, alpha in parts}
        return alphas.pop() if len(alphas) == 1 else {plan.sites[0]: alpha for plan, alpha in parts}

    return made


@pytest.fixture(scope="module")
def folder(plans, tmp_path_factory):
    found = tmp_path_factory.mktemp("sets")
    plans["kind"].save_pretrained(found / "kind")
    return found


@pytest.fixture(scope="module")
def engine(small, folder):
    """Runs in this process, with the prefix cache, more requests than slots, and a folder of sets."""
    content = f'{{"sets": "{folder}", "slots": {SLOTS}, "sites": ["attention", "layer"], "units": 16, '
    content += '"operations": ["shift", "scale", "ablate"], "probes": [["layer", 2]]}'
    with run_in_process(content):
        from vllm import LLM

        options = {"max_model_len": 256, "max_num_batched_tokens": 48, "max_num_seqs": 8, "block_size": BLOCK}
        options["num_gpu_blocks_override"] = 16  # for a few requests: others are put off, and begin anew
        llm = LLM(str(small[1]), enforce_eager=True, disable_log_stats=False, **options, **ENGINE)
        yield llm
        llm.llm_engine.engine_core.shutdown()


def test_each_request_has_its_strength(engine, plans, write):
    alphas = [0.5, 1.5, -1.0]
    found = ask(engine, *({KEY: "kind", ALPHA: alpha} for alpha in alphas))
    expected = [write([(plans["kind"], alpha)]) for alpha in alphas]
    assert found == expected and len(set(map(tuple, expected))) == 3


def test_plans_come_change_and_go_while_the_engine_runs(engine, plans, write, folder):
    with pytest.raises(Exception, match=r"'brief'.*'kind'"):
        ask(engine, {KEY: "brief", ALPHA: 1})
    plans["brief"].save_pretrained(folder / "brief")
    assert ask(engine, {KEY: "brief", ALPHA: 2}) == [write([(plans["brief"], 2)])]
    replaced = replace(plans["brief"], delta=-plans["brief"].delta)
    replaced.save_pretrained(folder / "brief")
    assert ask(engine, {KEY: "brief", ALPHA: 2}) == [write([(replaced, 2)])]
    shutil.rmtree(folder / "brief")
    with pytest.raises(Exception, match=r"'brief'.*'kind'"):
        ask(engine, {KEY: "brief", ALPHA: 2})
    assert ask(engine, {KEY: "kind", ALPHA: 1.5}) == [write([(plans["kind"], 1.5)])]


def test_a_plan_that_is_removed_stays_for_the_requests_that_run_with_it(engine, plans, write, folder):
    from vllm import SamplingParams

    plans["brief"].save_pretrained(folder / "gone")
    params = SamplingParams(temperature=0, min_tokens=TOKENS, max_tokens=TOKENS, extra_args={KEY: "gone", ALPHA: 2})
    engine.llm_engine.add_request("one", LONG, params)
    shutil.rmtree(folder / "gone")
    finished = []
    while engine.llm_engine.has_unfinished_requests():
        finished += [output for output in engine.llm_engine.step() if output.finished]
    assert list(finished[0].outputs[0].token_ids) == write([(plans["brief"], 2)])


def test_strength_in_nats(engine, plans, write, folder):
    plans["brief"].save_pretrained(folder / "dosed")
    alpha = plans["brief"].dose.alpha(0.3)
    assert ask(engine, {KEY: "dosed", KL: 0.3}) == [write([(plans["brief"], alpha)])]
    with pytest.raises(Exception, match=rf"{KL}.*'kind'.*{ALPHA}"):
        ask(engine, {KEY: "kind", KL: 0.3})


def test_sums_of_plans_in_one_request(engine, plans, write, folder):
    disjoint = plan_beside(plans["kind"])
    disjoint.save_pretrained(folder / "beside")
    (found,) = ask(engine, {KEY: ["kind", "beside"], ALPHA: [1.5, 1.5]})
    assert found == write([(plans["kind"], 1.5), (disjoint, 1.5)])
    assert found not in (write([(plans["kind"], 1.5)]), write([(disjoint, 1.5)]))


def test_more_steerings_at_once_than_there_are_slots_wait_for_one(engine, plans, write):
    alphas = [0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]
    assert len(alphas) > 2 * SLOTS
    found = ask(engine, None, *({KEY: "kind", ALPHA: alpha} for alpha in alphas))
    assert found[1:] == [write([(plans["kind"], alpha)]) for alpha in alphas]


def test_what_a_row_had_before_does_not_stay_in_it(engine, plans, write, folder):
    """A plan at another site comes into each row, and then the first again."""
    plans["praise"].save_pretrained(folder / "praise")
    for _ in range(2):
        for name in ("kind", "praise"):
            asked = [0.9 + i / 10 for i in range(SLOTS)]
            found = ask(engine, *({KEY: name, ALPHA: alpha} for alpha in asked))
            assert found == [write([(plans[name], alpha)]) for alpha in asked]


def test_ablation(engine, small, write, folder):
    found = {}
    for site in ("attention", "layer"):
        plan = random_plan(small[0], site, 16, "ablate", 5)
        plan = plan.take((plan.layer == plan.layer[0]).nonzero().flatten())
        plan.save_pretrained(folder / f"ablate-{site}")
        (found[site],) = ask(engine, {KEY: f"ablate-{site}", ALPHA: 2.5})
        assert found[site] == write([(plan, 2.5)])
    assert found["attention"] != found["layer"]


def test_an_answer_is_steered_from_its_marker_on(engine, small, demo, plans, folder):
    """The markers are tokens that the unsteered model happens to write."""
    model, tokenizer = small[0], demo[1]
    base = ask(engine, None)[0]
    places = [found for found in single_tokens(tokenizer, base) if 2 <= found[0] <= 12]
    (begin, start), (_, other) = places[0], places[1]
    plans["kind"].save_pretrained(folder / "plan-kind")
    texts = {}
    for name, scope in (
        ("started", {"start": start, "pauses": []}),
        ("paused", {"pauses": [[start, other]]}),
        ("never", {"start": "<a marker that never comes>", "pauses": []}),
    ):
        (folder / f"{name}.json").write_text(json.dumps({"plan": "plan-kind", "scope": scope}))
        given = austeer.answer_scope(tokenizer, scope.get("start"), [tuple(pair) for pair in scope["pauses"]])
        ids = tokenizer(LONG, return_tensors="pt")
        with warnings.catch_warnings(), austeer.steer(model, plans["kind"], alpha=2.0, scope=given):
            warnings.simplefilter("ignore")  # of the marker that never comes
            output = model.generate(**ids, min_new_tokens=TOKENS, max_new_tokens=TOKENS, do_sample=False)
        texts[name] = output[0][ids["input_ids"].shape[1] :].tolist()
    assert texts["never"] == base and texts["started"][: begin + 1] == base[: begin + 1]
    assert len(set(map(tuple, texts.values()))) == 3
    for _ in range(2):  # alone and beside each other, and from the prefix cache
        assert ask(engine, None, *({KEY: name, ALPHA: 2.0} for name in texts)) == [base, *texts.values()]
    assert [ask(engine, {KEY: name, ALPHA: 2.0})[0] for name in texts] == [*texts.values()]


@pytest.fixture
def judged(small, demo, plans, folder):
    """A probe between the scores of some prompts; and of each, what the model writes if it decides."""
    model, tokenizer = small[0], demo[1]
    prompts = [" ".join(PROMPTS[i:] + PROMPTS[:i]) * times for i in range(3) for times in (1, 4)]
    direction = torch.randn(128, generator=torch.Generator().manual_seed(0))
    width = {"layer": plans["kind"].model.widths["layer"]}
    probe = austeer.Probe("layer", 2, direction / direction.norm(), 0.0, replace(plans["kind"].model, widths=width))
    scores = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")
        with austeer.steer(model, plans["kind"], alpha=2.0, scope="generation", when=probe) as steering:
            model(**ids)
            scores += steering.report().when.scores
    ordered = sorted(scores)
    probe = replace(probe, threshold=(ordered[2] + ordered[3]) / 2)
    probe.save(folder / "some.probe")
    plans["kind"].save_pretrained(folder / "plan-kind")
    text = {"plan": "plan-kind", "scope": "generation", "when": "some.probe"}
    (folder / "judged.json").write_text(json.dumps(text))
    written = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")
        with austeer.steer(model, plans["kind"], alpha=2.0, scope="generation", when=probe):
            output = model.generate(**ids, min_new_tokens=TOKENS, max_new_tokens=TOKENS, do_sample=False)
        written.append(output[0][ids["input_ids"].shape[1] :].tolist())
    return prompts, written, [score > probe.threshold for score in scores]


def test_a_probe_decides_for_each_request_at_its_last_prompt_token(engine, judged):
    """Prompts in pieces and from the prefix cache, and requests that are put off."""
    prompts, written, fires = judged
    assert sum(fires) == 3
    from vllm import SamplingParams

    def params(extra):
        return SamplingParams(temperature=0, min_tokens=TOKENS, max_tokens=TOKENS, extra_args=extra)

    extra = {KEY: "judged", ALPHA: 2.0}
    base = engine.generate(prompts, params(None), use_tqdm=False)
    for (steered, one), fired in zip(zip(written, base, strict=True), fires, strict=True):
        assert (steered == list(one.outputs[0].token_ids)) != fired
    before = put_off(engine)
    for order in (prompts, prompts[::-1], prompts * 2):
        outputs = engine.generate(list(order), params(extra), use_tqdm=False)
        assert [list(o.outputs[0].token_ids) for o in outputs] == [written[prompts.index(text)] for text in order]
    assert put_off(engine) > before


@pytest.mark.parametrize("scope", ["all", "generation", "last_prompt_token", "prompt"])
def test_the_prefix_cache_gives_no_request_what_was_steered_otherwise(engine, plans, write, folder, scope):
    for name in ("kind", "praise"):
        plans[name].save_pretrained(folder / f"plan-{name}")
        text = f'{{"plan": "plan-{name}", "scope": "{scope}"}}'
        (folder / f"{scope}-{name}.json").write_text(text)
    asked = [None, ("kind", 1.5), ("praise", 1.0), ("kind", 0.5), None, ("kind", 1.5)]
    base = ask(engine, None)[0]
    expected = [base if one is None else write([(plans[one[0]], one[1])], scope) for one in asked]
    for one, tokens in zip(asked, expected, strict=True):  # one after the other: each finds the blocks of those before
        extra = None if one is None else {KEY: f"{scope}-{one[0]}", ALPHA: one[1]}
        assert ask(engine, extra) == [tokens], one
    assert len(set(map(tuple, expected))) > 2


def test_a_second_turn_finds_the_first_where_it_is_steered_alike(engine, small, demo, plans, folder):
    """Prompts of less than a block, whose scope ends inside of it; and texts that were steered as a whole."""
    model, tokenizer = small[0], demo[1]
    plans["kind"].save_pretrained(folder / "plan-kind")
    for scope in ("prompt", "all", "generation"):
        (folder / f"turn-{scope}.json").write_text(json.dumps({"plan": "plan-kind", "scope": scope}))
        engine.llm_engine.reset_prefix_cache()
        extra, counts = {KEY: f"turn-{scope}", ALPHA: 1.5}, [hits(engine)]
        ids = tokenizer(PROMPTS[0])["input_ids"]
        for _ in range(3):
            (found,) = ask(engine, extra, prompt={"prompt_token_ids": ids})
            with austeer.steer(model, plans["kind"], alpha=1.5, scope=scope):
                output = model.generate(
                    torch.tensor([ids]), min_new_tokens=TOKENS, max_new_tokens=TOKENS, do_sample=False
                )
            assert found == output[0, len(ids) :].tolist(), scope
            ids = ids + found
            counts.append(hits(engine))
        gained = [after - before for before, after in pairwise(counts)]
        assert gained[0] == 0 and (gained[2] > 0) == (scope == "all"), (scope, gained)


def test_an_aborted_pause_tells_those_that_wait(engine, folder):
    """As where the engine sleeps or ends: each request that came hears that it will not run."""
    from vllm import SamplingParams
    from vllm.v1.request import RequestStatus

    core = engine.llm_engine.engine_core.engine_core
    names = []
    for number in range(2 * SLOTS):
        extra = {KEY: "kind", ALPHA: 3.0 + number}
        names.append(f"waiting-{number}")
        engine.llm_engine.add_request(names[-1], LONG, SamplingParams(max_tokens=4, extra_args=extra))
    dropped = core.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    assert len(dropped) == len(names)
    engine.llm_engine.abort_request(names)
    assert ask(engine, *({KEY: "kind", ALPHA: 4.0 + number} for number in range(2 * SLOTS)))


def test_without_the_salt_the_answers_are_wrong(engine, plans, write, monkeypatch):
    """So the test before this one can fail."""
    from austeer.vllm import scheduler

    engine.llm_engine.reset_prefix_cache()
    monkeypatch.setattr(scheduler, "salted", lambda hasher, *_: hasher)
    ask(engine, None)
    wrong = ask(engine, {KEY: "kind", ALPHA: 1.5})
    engine.llm_engine.reset_prefix_cache()
    assert wrong != [write([(plans["kind"], 1.5)])]


def test_the_prompt_is_shared_where_only_what_is_generated_is_steered(engine, plans, demo, folder):
    plans["kind"].save_pretrained(folder / "plan-kind")
    (folder / "later.json").write_text('{"plan": "plan-kind", "scope": "generation"}')
    engine.llm_engine.reset_prefix_cache()
    length = len(demo[1](LONG)["input_ids"])
    full = (length - 1) // BLOCK * BLOCK
    counts = [hits(engine)]
    for extra in (None, {KEY: "later", ALPHA: 1.5}, {KEY: "later", ALPHA: 0.5}, {KEY: "kind", ALPHA: 1.5}, None):
        ask(engine, extra)
        counts.append(hits(engine))
    gained = [after - before for before, after in pairwise(counts)]
    assert gained == [0, full, full, 0, full]


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        ({KEY: "nobody", ALPHA: 1}, "'nobody'"),
        ({KEY: "../kind", ALPHA: 1}, r"'\.\./kind'"),
        ({KEY: "kind"}, ALPHA),
        ({KEY: "kind", ALPHA: True}, f"{ALPHA}.*True"),
        ({KEY: "kind", ALPHA: float("nan")}, f"{ALPHA}.*nan"),
        ({KEY: "kind", ALPHA: [1, 2]}, rf"{ALPHA}.*\[1, 2\]"),
        ({KEY: "kind", "austeer_aplha": 1}, "'austeer_aplha'"),
        ({ALPHA: 1}, f"{ALPHA}.*without"),
        ({KEY: "kind", ALPHA: 1, "austeer_row": "forged"}, "'austeer_row'"),
        ({KEY: ["kind", "kind"], ALPHA: [1, 1]}, "different"),
    ],
)
def test_what_cannot_be_had_is_refused_and_the_engine_goes_on(engine, plans, write, extra, match):
    with pytest.raises(Exception, match=match):
        ask(engine, extra)
    assert ask(engine, {KEY: "kind", ALPHA: 1.5}) == [write([(plans["kind"], 1.5)])]


def test_a_plan_without_room_or_of_another_model_is_refused(engine, small, plans, folder):
    other = replace(plans["kind"], model=replace(plans["kind"].model, layers=7))
    other.save_pretrained(folder / "other")
    random_plan(small[0], "neuron", 3, "shift", 0).save_pretrained(folder / "elsewhere")
    random_plan(small[0], "attention", 100, "shift", 0).save_pretrained(folder / "many")
    random_plan(small[0], "attention", 3, "push", 0).save_pretrained(folder / "push")
    none = torch.zeros(128)
    width = {"layer": plans["kind"].model.widths["layer"]}
    austeer.Probe("layer", 1, none, 0.0, replace(plans["kind"].model, widths=width)).save(folder / "elsewhere.probe")
    text = {"plan": "kind", "scope": "generation", "when": "elsewhere.probe"}
    (folder / "unplaced.json").write_text(json.dumps(text))
    (folder / "broken.safetensors").write_bytes(b"half of a file")
    for name, match in [
        ("other", "7 layers"),
        ("elsewhere", "'neuron'.*declare"),
        ("many", '"units": '),
        ("push", "push.*declare"),
        ("unplaced", r'"probes": \[\["layer", 1\]\]'),
        ("broken", r"broken\.safetensors"),
    ]:
        with pytest.raises(Exception, match=match):
            ask(engine, {KEY: name, ALPHA: 1})


def test_the_scheduler_refuses_what_no_front_end_has_seen(engine, plans, write, monkeypatch):
    """As where a front end of another language takes requests in."""
    from austeer.vllm.requests import Requests

    monkeypatch.setattr(Requests, "validate_params", classmethod(lambda cls, params: None))
    from vllm import SamplingParams

    params = [
        SamplingParams(temperature=0, max_tokens=4, extra_args={KEY: name, ALPHA: 1.5}) for name in ("no", "kind")
    ]
    refused, served = engine.generate([LONG, LONG], params, use_tqdm=False)
    assert refused.outputs[0].finish_reason == "error" and not refused.outputs[0].token_ids
    assert list(served.outputs[0].token_ids) == write([(plans["kind"], 1.5)])[:4]


def test_another_scheduler_is_refused(small, folder):
    with run_in_process(str(folder)):
        from vllm import LLM

        from austeer.vllm.sets import ServingError

        options = {name: value for name, value in ENGINE.items() if name != "scheduler_cls"}
        with pytest.raises(ServingError, match=f"{VARIABLE}.*--scheduler-cls"):
            LLM(str(small[1]), max_model_len=64, enforce_eager=True, **options)
