"""Rules: what the values of several keys require of each other."""
