"""Training: the loop, which fits a screen, and the hooks around it."""
