"""The packaged neutral texts."""

from austeer.forward.neutral import neutral_texts


def test_texts_for_choosing_and_for_the_report_differ():
    assert not set(neutral_texts()) & set(neutral_texts("heldout")) and len(neutral_texts()) > 5
