"""Describe a run before it starts: its plan, and the memory of each rank. No torch."""
