#!/usr/bin/env python3
"""Check a configuration and start its ranks: `./deepy.py train.py configs/default.yml num_gpus=2`.

`./deepy.py --help` lists the options. Exit codes: 0 done, 1 the run failed, 2 the command or configuration is wrong,
130 interrupted before the run started.
"""

import sys
from pathlib import Path

from megatron.doors import enter

if __name__ == "__main__":
    enter(__file__)
    from megatron.errors import exit_code

    def start() -> int:
        """Import what takes a while, so that Ctrl-C meanwhile is no traceback, and run."""
        from megatron.launch.main import main

        return main(sys.argv[1:], Path(__file__).resolve().parent)

    sys.exit(exit_code(start))
