"""One file for each architecture of Hugging Face: a table of its settings and its parameters."""
