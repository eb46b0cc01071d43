"""Everything that happens around a training step: one file per hook."""
