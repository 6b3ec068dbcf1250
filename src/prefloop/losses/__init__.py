"""Losses: pure functions on vectors, one file a family, the equation above the code."""
