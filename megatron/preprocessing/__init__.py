"""Text to token files: read, clean, tokenize, write, resume."""
