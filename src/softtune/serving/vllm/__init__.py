"""The other engine for texts: vLLM, for GPUs and clusters."""
