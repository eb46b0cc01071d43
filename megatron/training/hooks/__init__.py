"""Hooks: what happens around a training step, one file each."""
