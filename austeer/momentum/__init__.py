"""Activation momentum: what a measurement counted, and its file."""
