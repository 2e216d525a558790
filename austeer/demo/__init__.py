"""The demo: pairs to a steered model in one command."""
