"""Optimizers and learning-rate schedules, in plain torch."""
