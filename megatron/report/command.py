r"""Write the report of one or several runs: curves, events, evaluations, samples and configurations on one page.

    python tools/report.py checkpoints/stdlib/logs -o report.html
    python tools/report.py runs/a runs/b runs/c -o compared.html
    python tools/report.py runs/a --watch

RUN is the log folder of a run, or the folder of checkpoints that has it as logs/. Beside report.html, report.md has the
tables and report.csv the figures. Exit code 0: written; 2: a run cannot be read, or the report cannot be written there.
"""

import os
import signal
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

import psutil

from megatron.errors import exit_code
from megatron.files import expanded
from megatron.progress import Progress
from megatron.report.live import serve
from megatron.report.write import check_output, open_runs, read_runs, write_report
from megatron.terminal import live


def parse(arguments: Sequence[str]) -> Namespace:
    """The flags. Raises UserError for paths that cannot be expanded."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="log folder of a run")
    add("-o", "--output", default="report.html", metavar="FILE", help="page to write (report.html)")
    add("--watch", action="store_true", help="write nothing; serve the page on this machine alone, always up to date")
    add("--port", type=int, default=8008, metavar="N", help="of --watch (8008); 0: a free one")
    add("--background", action="store_true", help="without a word, at the lowest priority of CPU and disk")
    options = parser.parse_args(arguments)
    if not 0 <= options.port < 65536:
        parser.error(f"--port ({options.port}) must be from 0 to 65535")
    options.runs = [Path(expanded(run, "RUN")) for run in options.runs]
    options.output = Path(expanded(options.output, "--output"))
    return options


def run(arguments: Sequence[str]) -> None:
    """Write the report, or serve it until the process is stopped. Raises UserError."""
    options = parse(arguments)
    if options.background:
        _give_way()
    folders = open_runs(options.runs)
    if options.watch:
        serve(folders, options.port)
        return
    check_output(options.output)
    began = time.time()
    with live(not options.background):
        with Progress(f"reading {', '.join(map(str, options.runs))}"):
            records = read_runs(folders)
        if options.background and _written_since(began, options.output):
            return
        with Progress(f"writing {options.output}"):
            report = write_report(records, options.output)
    if not options.background:
        size = options.output.stat().st_size / 1e6
        print(f"{options.output} ({size:.1f} MB), with {options.output.with_suffix('.md').name} and .csv beside it")
        for record in report.runs:
            print("\n".join(f"{record.name}: {note}" for note in record.notes), end="\n" if record.notes else "")


def _written_since(began: float, output: Path) -> bool:
    """Whether another process, which may have read more, has written the report meanwhile."""
    return output.is_file() and output.stat().st_mtime > began


def _give_way() -> None:
    """Let every other process go first, and leave nothing half written when it is ended."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    os.nice(19)
    if hasattr(psutil, "IOPRIO_CLASS_IDLE"):
        psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)


def main() -> int:
    """The exit code of the command."""
    return exit_code(lambda: run(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
