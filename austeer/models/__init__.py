"""What a model is made of: families, sites, weights; loading."""

from .load import fits, load_model, load_offloaded

__all__ = ["fits", "load_model", "load_offloaded"]
