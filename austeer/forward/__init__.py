"""Texts through a model: tokens, batches, generation, timing."""
