"""A model that writes what it is told to, and the logits it had when it did."""

import torch
from transformers import LogitsProcessor

from dense_formula import formula_at, logits


class Script(LogitsProcessor):
    """Forces the tokens of each row after its prompt, one list a row of the batch as ``generate`` runs it."""

    def __init__(self, texts, prompt):
        self.texts, self.prompt = torch.tensor(texts), prompt

    def __call__(self, ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter_(1, self.texts[:, ids.shape[1] - self.prompt, None], 0.0)


def scripted_logits(model, batch, texts, **options):
    """Logits [batch, tokens, vocabulary] with which ``generate`` chose each of the scripted tokens."""
    found = model.generate(
        **batch,
        max_new_tokens=len(texts[0]),
        do_sample=False,
        logits_processor=[Script(texts, batch["input_ids"].shape[1])],
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    assert found.sequences[:, batch["input_ids"].shape[1] :].tolist() == [list(text) for text in texts]
    return torch.stack(found.logits, 1)


def logits_by_formula(model, batch, texts, plan, alpha, where):
    """The same from one pass over whole texts, with the definition at the tokens ``where``, bool [batch, columns]."""
    ids = torch.cat([batch["input_ids"], torch.tensor(texts)], 1)
    mask = torch.cat([batch["attention_mask"], torch.ones(ids.shape[0], len(texts[0]), dtype=torch.int64)], 1)
    with formula_at(model, plan, alpha, where):
        return logits(model, {"input_ids": ids, "attention_mask": mask})[:, batch["input_ids"].shape[1] - 1 : -1]
