"""Checkpoints: saved under one layout, loaded under any other."""
