"""vLLM as an engine for text generation, for GPUs and clusters."""
