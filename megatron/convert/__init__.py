"""Convert weights between our models and those of Hugging Face, in both directions."""
