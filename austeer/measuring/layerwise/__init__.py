"""Measuring layer by layer: each layer is loaded once, and all pairs run through it."""
