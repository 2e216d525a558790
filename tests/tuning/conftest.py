"""Shared by the tests of the search."""

import pytest

from austeer.measuring import profiling


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    """Where profiles are kept: not the user's own folder."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(profiling, "cache_folder", lambda: folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def short_texts():
    """What settings write, kept short: sampling from a real vocabulary is most of a tiny model's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("austeer.tuning.writing.TOKENS", 6)
        yield
