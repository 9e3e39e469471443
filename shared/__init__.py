"""The vocabulary of the mesh: messages, subjects, the bus, block hashes, noise. No torch, no service."""
