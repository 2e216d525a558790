"""Patches: exactly our forward goes, whatever accelerate's hooks do meanwhile, and nothing is left behind."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from torch import nn

from austeer import SteeringError
from austeer.models.hooks import hooks_on
from austeer.models.patches import Patch, owner_of


class Add(ModelHook):
    """Adds a number to the output; the number tells which hooks are on."""

    def __init__(self, number):
        self.number = number

    def post_forward(self, module, output):
        return output + self.number


class Adding:
    """The same as a patch."""

    def __init__(self, module, number):
        self.patch, self.number = Patch(module), number

    def forward(self, *args):
        return self.patch.inner(*args) + self.number

    def attach(self):
        self.patch.attach(self.forward)

    def detach(self):
        self.patch.detach()


@pytest.fixture
def linear():
    layer = nn.Linear(3, 3)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def value(module):
    with torch.no_grad():
        return float(module(torch.zeros(1, 3))[0, 0])


def test_patches_come_off_last_first(linear):
    before, patches = dict(vars(linear)), [Adding(linear, 10**i) for i in range(3)]
    for patch in patches:
        patch.attach()
    assert value(linear) == 111
    for patch, left in zip(reversed(patches), (11, 1, 0)):
        patch.detach()
        patch.detach()  # again does nothing
        assert value(linear) == left
    assert vars(linear) == before


def test_under_hooks_that_were_there_and_come_later(linear):
    add_hook_to_module(linear, Add(1))
    ours = Adding(linear, 10)
    ours.attach()
    assert owner_of(linear, Adding) is ours and owner_of(linear, Patch) is None
    add_hook_to_module(linear, Add(100), append=True)
    assert value(linear) == 111
    ours.detach()
    assert value(linear) == 101 and [type(hook) for hook in hooks_on(linear)] == [SequentialHook, Add, Add]
    remove_hook_from_module(linear)
    assert value(linear) == 0


@pytest.mark.parametrize("first", ["the hook", "ours"])
def test_a_hook_that_goes_while_the_patch_is_on(linear, first):
    ours = Adding(linear, 10)
    if first == "ours":
        ours.attach()
    add_hook_to_module(linear, Add(1))
    if first == "the hook":
        ours.attach()
    remove_hook_from_module(linear)
    assert value(linear) == 10
    ours.detach()
    assert value(linear) == 0


def test_a_hook_that_replaces_another_passes_the_patch_on(linear):
    add_hook_to_module(linear, Add(1))
    ours = Adding(linear, 10)
    ours.attach()
    add_hook_to_module(linear, Add(100))  # not appended
    assert value(linear) == 110
    ours.detach()
    assert value(linear) == 100


def test_offloaded_weights_stay_where_they_are(linear):
    cpu_offload(linear, execution_device=torch.device("cpu"))
    ours = Adding(linear, 10)
    ours.attach()
    assert value(linear) == 10
    ours.detach()
    assert value(linear) == 0 and linear.weight.device.type == "meta"


def test_a_forward_of_the_instance_comes_back(linear):
    linear.forward = own = lambda x: x + 5
    ours = Adding(linear, 10)
    ours.attach()
    assert value(linear) == 15
    ours.detach()
    assert value(linear) == 5 and vars(linear)["forward"] is own


def test_a_copy_has_a_patch_of_its_own(linear):
    ours = Adding(linear, 10)
    ours.attach()
    other = copy.deepcopy(linear)
    ours.number = 20
    ours.detach()
    assert value(other) == 10 and value(linear) == 0
    assert owner_of(other, Adding).patch.module is other


def test_a_forward_that_was_wrapped_is_told_and_left(linear):
    ours = Adding(linear, 10)
    ours.attach()
    inner = linear.forward
    linear.forward = lambda x: inner(x) + 100
    with pytest.raises(SteeringError, match=r"Linear: found another forward in place of ours"):
        ours.detach()
    assert value(linear) == 110
    ours.detach()
