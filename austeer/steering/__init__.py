"""A plan on a live model: which path each site takes, strengths, rows, scopes."""
