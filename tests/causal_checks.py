"""What tests of the causal check share: its pairs, and a check of a few AUs."""

from austeer.causal import causal_check
from austeer.demo.demo import load_data
from austeer.tasks import Task

MEASURED, HELD_OUT = load_data().tuning[:10], Task.of_pairs(load_data().held_out[:5])
FEW = {"n": 3, "sample": 6, "groups": 2, "alphas": [1], "progress": False}


class Stopped(Exception):
    pass


def checked(model, demo, momentum, **changes):
    return causal_check(model, demo[1], HELD_OUT, momentum, **({"site": "attention"} | FEW | changes))
