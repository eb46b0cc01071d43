"""Tasks of the lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), scored with our models.

The first rank runs the harness: it alone reads datasets, builds prompts, computes metrics, prints and writes. All
ranks compute what it asks for. `lm_eval` is imported in this folder only, and only where tasks are asked for.
Below `evaluation.py`, above `generation/`.
"""
