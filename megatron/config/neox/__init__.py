"""GPT-NeoX's keys: honoured, translated, or refused with a reason."""
