"""How models write calls and thoughts into their answers, and how these are read back."""
