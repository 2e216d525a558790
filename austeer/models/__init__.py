"""What a model is made of: families, sites, weights, devices; and how one is loaded."""

from .load import fits, load_model, load_offloaded

__all__ = ["fits", "load_model", "load_offloaded"]
