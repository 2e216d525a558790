"""What the tests of the export share."""

import pytest

from tiny_models import tiny_model


@pytest.fixture(scope="package")
def model():
    """A tiny Llama; one for all, which leave it as it is."""
    return tiny_model()


@pytest.fixture
def out(tmp_path):
    """Where an adapter goes."""
    return tmp_path / "adapter"
