"""The keys of the configuration, in groups, with their types, defaults and documentation."""
