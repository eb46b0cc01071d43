"""Metrics of a run: peaks of devices, the log line, and writers."""
