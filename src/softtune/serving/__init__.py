"""Many tasks from one frozen model: a registry of adapters, an engine that answers requests of all of them at once, and
OpenAI's HTTP API around both."""
