"""Log-probabilities from last hidden states are those of the model's own logits, whatever it does with them."""

import pytest
import torch

from austeer import CaptureError
from austeer.forward.logits import expect_head, log_probabilities
from austeer.models.structure import decoder_of
from tiny_models import ids_of_rows, tiny_model


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("cohere", {"logit_scale": 0.3}),
        ("granite", {"logits_scaling": 3.0}),
        ("gemma2", {"final_logit_softcapping": 0.5}),
        ("falcon_h1", {"lm_head_multiplier": 0.25}),
        ("recurrent_gemma", {"logits_soft_cap": 0.5}),
        ("mpt", {"logit_scale": 0.5}),
    ],
)
def test_scaled_and_capped_logits(family, changes):
    model, ids = tiny_model(family, **changes), ids_of_rows()
    expect_head(model)
    with torch.no_grad():
        expected = model(**ids).logits.log_softmax(-1)
        found = log_probabilities(model, decoder_of(model)(**ids).last_hidden_state)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_head_that_is_followed_by_something_unknown_is_refused():
    model = tiny_model()
    plain = model.forward

    def doubled(*args, **kwargs):
        output = plain(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    model.forward = doubled
    with pytest.raises(CaptureError, match="unknown way"):
        expect_head(model)
