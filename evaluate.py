#!/usr/bin/env python3
"""Measure a trained model (the script of one rank).

`./deepy.py evaluate.py CONFIG ... [key=value ...]` starts this script on every rank;
`torchrun --nproc_per_node N evaluate.py CONFIG ...` and plain `python evaluate.py CONFIG ...` work as well.
"""

import sys

from megatron.doors import enter, run

if __name__ == "__main__":
    enter(__file__)
    sys.exit(run(__file__, "megatron.evaluation.run:evaluate"))
