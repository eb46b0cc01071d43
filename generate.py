#!/usr/bin/env python3
"""Generate text with a trained model (the script of one rank).

`./deepy.py generate.py CONFIG ... [key=value ...]` starts this script on every rank;
`torchrun --nproc_per_node N generate.py CONFIG ...` and plain `python generate.py CONFIG ...` work as well.
"""

import sys

from megatron.doors import enter, run

if __name__ == "__main__":
    enter(__file__)
    sys.exit(run(__file__, "megatron.generation.run:generate"))
