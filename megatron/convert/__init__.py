"""Our models and those of Hugging Face. Floor 5."""
