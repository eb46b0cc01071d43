"""Write the report of runs, or serve it live; `python tools/report.py --help`."""

import sys

from megatron.report.command import main

if __name__ == "__main__":
    sys.exit(main())
