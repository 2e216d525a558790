"""What this machine has free, and how fast it is."""

import pytest
import torch

from austeer.errors import ModelError
from austeer.utils.machine import free_on, matmul_rate, read_rate


def test_rates_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("austeer.utils.machine.SECONDS", 0.02)
    assert matmul_rate(torch.device("cpu"), torch.bfloat16, 8, 16, 32) > 0
    file, empty = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    file.write_bytes(bytes(5 * 2**20))
    empty.touch()
    assert read_rate([file, empty]) > 0 and read_rate([empty]) is None and read_rate([]) is None


def test_devices():
    assert free_on("cpu") == (torch.device("cpu"), free_on("cpu")[1]) and free_on("cpu")[1] > 0
    if not torch.cuda.is_available():
        assert free_on(None)[0] == free_on("auto")[0] == torch.device("cpu")
        with pytest.raises(ModelError, match=r"device: .*'cuda:0'"):
            free_on("cuda:0")
