"""OpenAI's HTTP API around what is served, and a page to try it."""
