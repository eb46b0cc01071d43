"""Metrics of a run: FLOPs, the log line, and writers."""
