"""Deepy: pretraining of GPT models. `docs/architecture.md` shows the rooms."""
