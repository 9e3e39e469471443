"""The OpenAI API as msgspec structs."""
