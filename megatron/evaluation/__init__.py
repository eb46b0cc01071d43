"""evaluate.py: the perplexity of text, the likeness of answers to references, and tasks of the harness."""
