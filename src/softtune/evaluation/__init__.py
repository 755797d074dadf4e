"""Predictions of a model with an adapter, and their metrics."""
