#!/usr/bin/env python3
"""Train a model (the script of one rank).

`./deepy.py train.py CONFIG ... [key=value ...]` starts this script on every rank;
`torchrun --nproc_per_node N train.py CONFIG ...` and plain `python train.py CONFIG ...` work as well.
"""

import sys

from megatron.doors import enter, run

if __name__ == "__main__":
    enter(__file__)
    sys.exit(run(__file__, "megatron.training.run:train"))
