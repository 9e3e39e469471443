"""Proposes speculative tokens; never asked, never trusted."""
