"""Stable storage. Knows the engine's values, no transport."""
