"""Training, evaluation and inference of a list of layers; the only room that uses DeepSpeed at run time."""
