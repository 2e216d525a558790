"""Runs pairs through a model and counts, whole or by layer."""
