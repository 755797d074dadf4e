"""Comparisons and sweeps of many runs, and their reports."""
