"""Weights and settings of our models and of Hugging Face's, in both directions; read family.py first."""
