"""Tasks of the lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), scored with our models.

Rank 0 runs the harness: it alone reads datasets, builds prompts, computes metrics, prints and writes. All ranks compute
likelihoods and continuations. `lm_eval` is imported in this folder only, and only if `eval_tasks` is set.
"""
