"""Continuous batching over a paged KV cache; verifies what drafters propose."""
