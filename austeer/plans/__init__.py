"""What is steered: the plan, its file, its evidence, its card, and whether it fits a model."""
