"""Token files, and the samples and batches that training reads from them."""
