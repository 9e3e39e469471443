"""The CPU step in C++ and its Python face."""
