"""Requests that are steered in their answers, or if a probe fires: each batch's rows, by their definition."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from austeer.errors import SiteError
from austeer.models.sites import Fingerprint
from austeer.plans.probe import Probe
from austeer.steering.markers import Answer, Automaton
from austeer.vllm.layers import install
from austeer.vllm.running import Running
from austeer.vllm.sets import ServingError
from austeer.vllm.slots import RowOf, Slots
from austeer.vllm.tables import Row, Structure
from made_plans import MODEL, SHIFT

SLOTS, TOKENS, VOCABULARY, ROW = 3, 16, 6, 1
NONE = torch.empty(0)
NO_AUS = Row(NONE.int(), NONE.long(), NONE, NONE, NONE.int(), NONE)
ANSWER = Answer(start=((1, 2),), pauses=((((3,),), ((4,), (5, 5))),))


def running(slots: Slots) -> Running:
    structure = Structure(Fingerprint("llama", 1, {}, "a model", None), 4, {})
    return Running(nn.Module(), structure, slots, range(1), (0, 1), TOKENS, VOCABULARY, SLOTS, torch.device("cpu"))


@pytest.fixture(scope="module")
def empty_row(tmp_path_factory) -> str:
    """The file of a row without AUs: rows' numbers are what is tested here."""
    path = tmp_path_factory.mktemp("rows") / "row.safetensors"
    NO_AUS.save(path)
    return str(path)


@st.composite
def requests(draw):
    """(tokens, how many of them are the prompt, whether in an answer, the probe's score or None) of some requests."""
    found = []
    for _ in range(draw(st.integers(1, SLOTS))):
        tokens = draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=2, max_size=9))
        prompt = draw(st.integers(1, len(tokens) - 1))
        answer = draw(st.booleans())
        score = draw(st.sampled_from([None, -1.0, 1.0])) if answer else draw(st.sampled_from([-1.0, 1.0]))
        found.append((tokens, prompt, answer, score))
    return found


@given(requests(), st.lists(st.tuples(st.integers(0, 99), st.integers(1, 4)), min_size=60, max_size=60))
@settings(deadline=None, max_examples=60)
def test_rows_are_those_of_the_definition_however_the_tokens_come(empty_row, asked, choices):
    """Chunks of prompts, requests that begin anew with what they have written, and slots that are exchanged."""
    slots = Slots(SLOTS)
    ours = running(slots)
    place = list(range(SLOTS))  # the slot of each request
    done = [0] * len(asked)

    def steering(number):
        _, prompt, answer, score = asked[number]
        return RowOf(
            ROW,
            "a digest",
            empty_row,
            prompt,
            1000,
            prompt,
            ANSWER if answer else None,
            None if score is None else number,
        )

    def expected(number, position):
        tokens, prompt, answer, score = asked[number]
        inside = not answer or Automaton(ANSWER).read(tokens)[position]
        return ROW if position >= prompt and inside and (score is None or score > 0) else -1

    known = [prompt for _, prompt, _, _ in asked]
    for number, (tokens, prompt, _, _) in enumerate(asked):
        slots.put(place[number], steering(number), tokens[:prompt])
    for what, size in choices:
        left = [n for n in range(len(asked)) if done[n] < len(asked[n][0])]
        if not left:
            break
        if what % 7 == 0 and done[left[0]] >= asked[left[0]][1]:  # put off: it begins anew, its tokens are known
            tokens = asked[left[0]][0]
            known[left[0]] = done[left[0]] + 1
            slots.put(place[left[0]], steering(left[0]), tokens[: known[left[0]]])
            done[left[0]] = 0
        if what % 5 == 0 and len(asked) == SLOTS:
            slots.move(place[0], place[1], swap=True)
            place[0], place[1] = place[1], place[0]
        batch, rows, ids, scores = [], [], [], []
        for number in sorted(left, key=lambda n: place[n]):
            tokens, prompt, _, score = asked[number]
            count = min(size, known[number] - done[number]) if done[number] < known[number] else 1
            batch.append((place[number], count, done[number]))
            for position in range(done[number], done[number] + count):
                rows.append(expected(number, position))
                ids.append(tokens[position])
                judged = position == prompt - 1 and score is not None and known[number] == prompt
                scores.append(score if judged else 9.0)  # what is not judged has a score of others
            done[number] += count
        one, lengths, first = (np.array(column, dtype=np.int64) for column in zip(*batch))
        ours.prepare(one, lengths, first, len(rows) + 1, torch.tensor([*ids, 0]))
        assert ours.rows.tensor[: len(rows) + 1].tolist() == [*rows, -1]
        ours.scores[: len(scores)] = torch.tensor(scores)  # of this pass, which the next one settles


class Layer(nn.Module):
    def forward(self, hidden, residual):
        return hidden + 1, residual


def decoder(width=6):
    """Two layers of Llama's names in vLLM."""
    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList(Layer() for _ in range(2))
    for layer in model.model.layers:
        layer.mlp = nn.Module()
        layer.mlp.down_proj = nn.Module()
        layer.mlp.down_proj.input_size, layer.mlp.down_proj.output_size = 10, width
    return model


def probe(layer=1, threshold=0.5):
    return Probe("layer", layer, torch.randn(6), threshold, replace(MODEL, layers=2, widths={"layer": 6}))


def test_a_probe_scores_the_tokens_that_are_judged_on_what_the_layer_gives(seed):
    structure = Structure(replace(MODEL, layers=2), 3, {}, (("layer", 0), ("layer", 1)))
    rows, scores = torch.full((8,), -1, dtype=torch.int32), torch.full((8,), 7.0)
    model = decoder()
    tables = install(model, structure, range(2), rows.clone(), judged=(rows, scores))
    probes = [probe(0), probe(1), None]
    shift = replace(SHIFT, model=replace(MODEL, layers=2), layer=torch.tensor([0, 1], dtype=torch.int32))
    room = replace(structure, room={("attention", 0, "linear"): 1, ("layer", 1, "linear"): 1})
    for number, one in enumerate(probes):
        found = room.row([(shift, 1.0)], one)
        tables.fill(number, replace(NO_AUS, probed=found.probed, probe=found.probe))
    hidden, residual = torch.randn(5, 6).bfloat16(), torch.randn(5, 6).bfloat16()
    rows[:5] = torch.tensor([1, -1, 0, 2, 1])
    for number, layer in enumerate(model.model.layers):
        hidden, _ = layer(hidden, residual)
        x = hidden.double() + residual.double()
        for token in (t for t in range(5) if rows[t] >= 0):
            one = probes[rows[token]]
            if one is not None and one.layer == number:
                score = float(x[token] @ one.direction.double()) - one.threshold
                assert scores[token] == pytest.approx(score, rel=1e-5, abs=1e-5)
    assert scores[1] == scores[3] == scores[5] == 7.0


def test_a_probe_without_room_or_on_a_part_of_the_model_is_refused():
    structure = Structure(replace(MODEL, layers=2), 3, {}, (("layer", 0),))
    plan = replace(SHIFT.top(1), model=replace(MODEL, layers=2))
    with pytest.raises(ServingError, match=r'layer 1.*"probes": \[\["layer", 1\]\]'):
        replace(structure, room={("attention", 1, "linear"): 1}).row([(plan, 1.0)], probe(1))
    judged = torch.zeros(4, dtype=torch.int32), torch.zeros(4)
    with pytest.raises(ServingError, match="pipeline"):
        install(decoder(), structure, range(1, 2), judged[0], judged=judged)
    inside = replace(structure, probes=(("neuron", 0),), model=replace(MODEL, layers=2, widths={"neuron": 10}))
    with pytest.raises(ServingError, match=r"'neuron'.*2 processes"):
        install(decoder(), inside, range(2), judged[0], (0, 2), judged)
    with pytest.raises(SiteError, match="'layer', layer 0: found 7"):
        install(decoder(7), structure, range(2), judged[0], judged=judged)
