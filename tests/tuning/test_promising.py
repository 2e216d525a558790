"""Which settings by effect are tried: those of the largest predicted effect, and others where nothing is predicted."""

from types import SimpleNamespace

import pytest

from austeer.errors import SelectionError
from austeer.momentum.by_effect import EffectCurve
from austeer.tuning import promising

KS = (1, 10)


@pytest.fixture
def tried(monkeypatch):
    """The settings (sites, k) that are tried of two sites, three at most, given their curves."""
    monkeypatch.setattr(promising, "MOST", 3)
    momentum = SimpleNamespace(select=lambda sites, k, **options: (sites, k))
    material = SimpleNamespace(momentum=momentum, with_profile=lambda method: None)
    monkeypatch.setattr(promising, "Arm", lambda method, plan, k, detail: SimpleNamespace(digest=plan, plan=plan))

    def found(curves):
        monkeypatch.setattr(promising, "best_sites", curves)
        return [arm.plan for arm in promising.promising_arms(material, ("attention", "ffn"), KS, True)]

    return found


def test_the_largest_predictions_come_first_and_sites_that_predict_nothing_last(tried):
    curves = [EffectCurve(("ffn",), KS, (1.0, 2.0))]
    assert tried(lambda *args: curves) == [(("ffn",), 10), (("ffn",), 1), (("attention",), 1)]
    curves.append(EffectCurve(("attention",), KS, (3.0, 1.5)))
    assert tried(lambda *args: curves) == [(("attention",), 1), (("ffn",), 10), (("attention",), 10)]


def test_where_nothing_is_predicted_everything_is_tried(tried):
    def none(*args):
        raise SelectionError("no halves")

    assert len(tried(none)) == 6
