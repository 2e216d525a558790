"""A plan on a live model: paths, strengths, rows, scopes."""
