"""Generate text with a trained model: prompts, decoding, sampling, JSON lines."""
