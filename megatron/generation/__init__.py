"""Text out of a trained model: prompts, decoding, sampling, JSON lines."""
