"""What a run tells about itself: FLOPs, the log line, and the writers of its metrics."""
