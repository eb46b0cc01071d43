"""Training, evaluation and inference of a list of layers; the only room that imports DeepSpeed."""
