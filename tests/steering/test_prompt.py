"""The prompt's length and padding while generate runs, and as they were afterwards."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from austeer import SteeringError
from austeer.steering.prompt import Prompt, padding


class Writer(nn.Module):
    """Something with a generate of transformers' form; it tells what the prompt was while it ran."""

    def __init__(self):
        super().__init__()
        self.seen, self.prompt = [], None

    def generate(self, inputs=None, generation_config=None, streamer=None, **kwargs):
        p = self.prompt
        pads = None if p.padding is None else [t.tolist() for t in p.padding]
        self.seen.append((p.length, int(p.on_device), p.known, p.batch, pads))
        if kwargs.get("fails"):
            raise KeyError("mine")
        if kwargs.get("again"):
            self.generate(torch.ones(1, 2, dtype=torch.int64))
            self.generate(inputs, **{**kwargs, "again": False})
        return "written"


@pytest.fixture
def writer():
    model = Writer()
    model.prompt = Prompt(model, torch.device("cpu"))
    model.prompt.attach()
    yield model
    model.prompt.detach()
    assert "generate" not in vars(model)


IDS = torch.ones(2, 5, dtype=torch.int64)
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((IDS,), {}, (5, 5, True, 2, None)),
        ((), {"inputs": IDS}, (5, 5, True, 2, None)),
        ((), {"input_ids": IDS, "attention_mask": MASK}, (5, 5, True, 2, [[2, 0], [0, 1]])),
        ((), {"inputs_embeds": torch.zeros(3, 4, 8)}, (4, 4, True, 3, None)),
        ((), {"input_ids": IDS[:, :0], "inputs_embeds": torch.zeros(3, 4, 8)}, (4, 4, True, 3, None)),
        # New tokens only, going on from a cache: the mask is as long as all of them.
        ((IDS,), {"attention_mask": torch.ones(2, 9)}, (9, 9, True, 2, [[0, 0], [0, 0]])),
        ((), {}, (1, 1, True, 1, None)),
        # Embeddings are what runs, whatever ids stand beside them.
        ((), {"input_ids": IDS[:, :1], "inputs_embeds": torch.zeros(2, 4, 8)}, (4, 4, True, 2, None)),
        # A generate of another form: nothing is known.
        ((), {"idx": IDS}, (None, 0, False, None, None)),
    ],
)
def test_what_generate_is_given_tells(writer, args, kwargs, expected):
    assert writer.generate(*args, **kwargs) == "written"
    assert writer.seen == [expected]
    assert (writer.prompt.length, writer.prompt.known, writer.prompt.batch, writer.prompt.padding) == (
        None,
        False,
        None,
        None,
    )


def test_guidance_runs_two_prompts_and_is_refused_under_a_scope(writer):
    for how in ({"guidance_scale": 2.0}, {"generation_config": SimpleNamespace(guidance_scale=1.5)}):
        with pytest.raises(SteeringError, match=r"guidance_scale: .*\d.*scope"):
            writer.generate(IDS, **how)
    writer.generate(IDS, guidance_scale=1)
    assert len(writer.seen) == 1


def test_what_was_set_comes_back_also_after_an_error_and_inside_another_generate(writer):
    writer.prompt.length = 7
    with pytest.raises(KeyError, match="mine"):
        writer.generate(IDS, fails=True)
    assert writer.prompt.length == 7 and int(writer.prompt.on_device) == 7
    writer.generate(IDS, attention_mask=MASK, again=True)
    assert [row[0] for row in writer.seen] == [5, 5, 2, 5]
    assert writer.seen[-1] == (5, 5, True, 2, [[2, 0], [0, 1]])
    assert writer.prompt.length == 7


def test_the_number_of_rows_is_told_before_anything_runs():
    model, told = Writer(), []

    def refuse(batch):
        told.append(batch)
        raise SteeringError("no")

    model.prompt = Prompt(model, torch.device("cpu"), refuse)
    model.prompt.attach()
    with pytest.raises(SteeringError, match="no"):
        model.generate(IDS)
    model.prompt.detach()
    assert told == [2] and model.seen == [] and model.prompt.batch is None


def test_a_model_without_generate_and_a_generate_that_was_replaced():
    plain = nn.Linear(2, 2)
    prompt = Prompt(plain, torch.device("cpu"))
    prompt.attach()
    prompt.detach()
    assert "generate" not in vars(plain)
    model = Writer()
    model.prompt = Prompt(model, torch.device("cpu"))
    model.prompt.attach()
    vars(model)["generate"] = theirs = lambda: "theirs"
    model.prompt.detach()
    assert vars(model)["generate"] is theirs


def test_padding_counts_no_columns_that_are_not_filled_yet():
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 1]])
    for end in (4, torch.tensor(4)):
        assert [t.tolist() for t in padding(mask, end)] == [[0, 1], [0, 1]]


def test_padding_of_masks():
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]])
    before, after = padding(mask)
    assert before.tolist() == [0, 1, 2, 0, 4] and after.tolist() == [0, 1, 0, 1, 4]
    assert [t.tolist() for t in padding(mask.bool())] == [before.tolist(), after.tolist()]


@pytest.mark.parametrize("wrong", [0, -3, 1.5, True, "4"])
def test_a_length_that_is_none_is_refused_and_changes_nothing(writer, wrong):
    writer.prompt.length = 3
    with pytest.raises(SteeringError, match=rf"prompt_length: .*{wrong!r}"):
        writer.prompt.length = wrong
    assert writer.prompt.length == 3
