"""HTTP in, tokens out, text back: the only place where text exists."""
