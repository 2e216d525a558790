"""Contrastive pairs of texts and their sources; no model."""
