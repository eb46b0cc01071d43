"""What runs on each node: the agent, and the ranks that it starts."""
