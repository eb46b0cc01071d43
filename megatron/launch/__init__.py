"""Start the ranks of a run, watch them, and end them."""
