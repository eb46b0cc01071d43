"""Our models and those of Hugging Face."""
