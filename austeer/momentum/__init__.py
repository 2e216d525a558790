"""Activation momentum: the result of a measurement, its merging and its report."""
