"""The model as plain torch modules; read gpt.py first."""
