"""From pairs to a steered model in one command, with figures."""
