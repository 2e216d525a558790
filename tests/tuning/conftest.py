"""Shared by the tests of the search."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def short_texts():
    """What settings write, kept short: sampling from a real vocabulary is most of a tiny model's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("austeer.tuning.writing.TOKENS", 6)
        yield
