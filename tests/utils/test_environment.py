"""The record of what a measurement was taken on."""

import json

import torch

from austeer.utils.environment import environment


def test_it_names_the_device_and_the_versions_that_run_here():
    found = environment()
    assert found["packages"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads() and found["device"]
    assert json.loads(json.dumps(found)) == found
