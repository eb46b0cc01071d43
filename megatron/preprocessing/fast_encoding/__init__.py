"""Encode with faster libraries where they are known to give the tokenizer's own ids."""
