"""Folders of Hugging Face: found, read, written, and compared with our models; read published.py first."""
