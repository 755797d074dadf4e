"""Comparisons, sweeps and reports: many runs, and what they say."""
