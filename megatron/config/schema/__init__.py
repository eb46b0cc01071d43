"""The configuration keys, in groups, with types, defaults and documentation."""
