"""Texts through a model: tokens, batches, shared prompts, last-token activations, generation, its time."""
