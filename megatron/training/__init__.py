"""Training: the loop, its set-up, and the hooks around it."""
