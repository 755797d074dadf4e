"""Serving many adapters on one frozen base model: a registry of adapters, engines that batch requests for all of them,
and an OpenAI-compatible HTTP API."""
