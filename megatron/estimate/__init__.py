"""What a run would be before it starts: its plan in words, and the memory of each rank. No torch."""
