"""What must hold between keys; each broken rule names both values and a way out."""
