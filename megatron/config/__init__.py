"""The configuration (Config), its rules, and the values derived from it (Plan). No torch."""
