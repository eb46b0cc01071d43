"""GPT-NeoX's keys: honoured, translated, or refused with the reason."""
