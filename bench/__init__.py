"""Measurements. Imports austeer and austeer_kernels; nothing but tests/ imports it."""
