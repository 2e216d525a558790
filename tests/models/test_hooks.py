"""Attachments: exactly our hook comes off, whatever else accelerate has chained with it, and nothing is left behind."""

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import SequentialHook, add_hook_to_module, remove_hook_from_module
from torch import nn

from austeer import SteeringError
from austeer.models.hooks import Attachment, Hook, hooks_on, is_hooked


class Add(Hook):
    """Adds a number to the output; the number tells which hooks are on."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def post_forward(self, module, output):
        return output + self.number


@pytest.fixture
def linear():
    layer = nn.Linear(3, 3)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def value(module):
    with torch.no_grad():
        return float(module(torch.zeros(1, 3))[0, 0])


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_hooks_come_off_in_any_order(linear, order):
    before = set(vars(linear))
    attachments = [Attachment(linear, Add(10**i)) for i in range(3)]
    left = 0
    for i, attachment in enumerate(attachments):
        attachment.attach()
        left += 10**i
        assert value(linear) == left
    for i in order:
        attachments[i].detach()
        attachments[i].detach()  # again does nothing
        left -= 10**i
        assert value(linear) == left
        assert not attachments[i].hook.bound
    assert set(vars(linear)) == before


def test_foreign_hooks_stay(linear):
    first, last = Add(1), Add(100)
    add_hook_to_module(linear, first)
    ours = Attachment(linear, Add(10))
    ours.attach()
    add_hook_to_module(linear, last, append=True)
    assert value(linear) == 111
    ours.detach()
    assert value(linear) == 101 and [type(hook) for hook in hooks_on(linear)] == [SequentialHook, Add, Add]


def test_offloaded_weights_stay_where_they_are(linear):
    cpu_offload(linear, execution_device=torch.device("cpu"))
    ours = Attachment(linear, Add(10))
    ours.attach()
    assert value(linear) == 10
    ours.detach()
    assert value(linear) == 0 and linear.weight.device.type == "meta"


def test_a_forward_of_the_instance_comes_back(linear):
    linear.forward = own = lambda x: x + 5
    ours = Attachment(linear, Add(10))
    ours.attach()
    assert value(linear) == 15
    ours.detach()
    assert value(linear) == 5 and vars(linear)["forward"] is own


def test_a_hook_that_someone_else_removed_is_not_missed(linear):
    ours = Attachment(linear, Add(10))
    ours.attach()
    remove_hook_from_module(linear)
    ours.detach()
    assert value(linear) == 0


def test_a_hook_that_was_replaced_is_told(linear):
    ours = Attachment(linear, Add(10))
    ours.attach()
    add_hook_to_module(linear, Add(100))  # not appended
    assert value(linear) == 100 and not is_hooked(linear, type(None))
    with pytest.raises(SteeringError, match=r"Linear.*append=True"):
        ours.detach()
    assert not ours.hook.bound and value(linear) == 100
    ours.detach()


def test_hooks_of_a_kind_are_found_in_chains(linear):
    class Other(Add):
        pass

    for number in (1, 2):
        Attachment(linear, Add(number)).attach()
    assert is_hooked(linear, Add) and not is_hooked(linear, Other)
    Attachment(linear, Other(3)).attach()
    assert is_hooked(linear, Other)
