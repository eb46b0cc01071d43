"""The model, in plain torch modules; read gpt.py first."""
