"""Anthropic's API as msgspec structs."""
