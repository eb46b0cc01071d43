"""Alerts: events of a run, sent to a webhook or a command. No torch."""
