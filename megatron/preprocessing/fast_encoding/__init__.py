"""Encode with faster libraries where they are verified to give the tokenizer's own ids."""
