"""Scores from whole texts, one after another, through the whole model."""

import torch


def naive_log_probability(model, tokenizer, text):
    """Sum over all tokens but the first of the full model's log-probability, one text alone."""
    ids = tokenizer([text])["input_ids"][0]
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(scores[i - 1, ids[i]]) for i in range(1, len(ids)))


def naive_log_odds(model, tokenizer, pairs):
    """From the whole texts: what their prompt adds is the same on both sides and cancels."""
    return torch.tensor(
        [
            naive_log_probability(model, tokenizer, p.prompt + p.positive)
            - naive_log_probability(model, tokenizer, p.prompt + p.negative)
            for p in pairs
        ],
        dtype=torch.float64,
    )
