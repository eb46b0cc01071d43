"""The record of a run: what it was started with, and the commands that make it again. No torch."""
