"""Token files, the order in which they are read, and the tools that make them."""
