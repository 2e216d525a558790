"""Contrastive pairs of texts and where they come from; no model."""
