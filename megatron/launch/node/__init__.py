"""The processes on each node: the agent, the wrapper around each rank, and the network between nodes."""
