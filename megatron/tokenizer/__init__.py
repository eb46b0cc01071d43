"""Tokenizers: one interface for text to ids and back, one factory per kind."""
