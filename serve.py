#!/usr/bin/env python3
"""Serve a trained model over HTTP (the script of one rank).

`./deepy.py serve.py CONFIG ... [key=value ...]` starts this script on every rank;
`torchrun --nproc_per_node N serve.py CONFIG ...` and plain `python serve.py CONFIG ...` work as well.
"""

import sys

from megatron.doors import enter, run

if __name__ == "__main__":
    enter(__file__)
    sys.exit(run(__file__, "megatron.serving.server:serve"))
