"""Text to token ids and back: one small interface, one factory per tokenizer."""
