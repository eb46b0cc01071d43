"""The only door to DeepSpeed at run time.

A list of layers goes in; train, evaluate, forward and state come out.
"""
