"""Print the commands that make a run again, as a shell script, from the record that it left in its log folder.

    python tools/rerun.py RUN > again.sh && bash again.sh

RUN is the log folder of the run, or its checkpoint folder. Code, packages, environment, configuration and the steps at
which the run was resumed are as they were; checkpoints and logs go into a new folder. Name data and tokenizer files
that have moved with --moved OLD=NEW. Exit code 1: the script is printed, but what it reads is not here, or is not the
same.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron.config.load import config_from_flat
from megatron.errors import DONE, FAILED, UserError, exit_code
from megatron.record.rerun import Place, Rerun, flat_config
from megatron.record.start import Start, find_starts
from megatron.resources import open_tokenizer
from megatron.training.data_fingerprint import compare_fingerprints, fingerprints_of


def main() -> int:
    """Print the script; returns 0, or 1 if it could not run here, or would make another run."""
    arguments = _parser().parse_args()
    starts = find_starts(arguments.run)
    into = arguments.into or Path(f"rerun-of-{arguments.run.resolve().name}")
    moved = tuple(_moved(text) for text in arguments.moved)
    code = None if arguments.code is None else str(arguments.code.resolve())
    rerun = Rerun(starts, Place(into.resolve(), moved, arguments.python, code))
    checks = [line for start, _ in rerun.parts for line in checked_inputs(rerun, start)]
    notes = list(dict.fromkeys([*(note for note, _ in checks), *rerun.problems]))
    problems = list(dict.fromkeys(f"{note}; see --moved" for note, fits in checks if not fits))
    print(Rerun(starts, rerun.place, notes).script(), end="")
    for problem in [*problems, *rerun.problems]:
        print(f"rerun: {problem}", file=sys.stderr)
    return FAILED if problems or rerun.problems else DONE


def checked_inputs(rerun: Rerun, start: Start) -> Iterator[tuple[str, bool]]:
    """A line about the data and one about the tokenizer of a start in the new place, and whether they are the same."""
    config = config_from_flat(flat_config(start, rerun.settings(start)))
    recorded = start.facts["data"]
    for key, datasets in recorded.items():
        for one in datasets:
            content = f"{one['documents']:,} documents, {one['tokens']:,} tokens, content {one['sample']}"
            yield f"{key}: {rerun.place.of_input(one['path'])}, once {one['path']}: {content}", True
    try:
        differences, _ = compare_fingerprints(fingerprints_of(config.data), recorded)
        yield from ((f"NOT THE SAME: {line}", False) for line in differences)
    except UserError as error:
        yield from ((f"NOT HERE: {problem}", False) for problem in error.problems)
    try:
        tokenizer = open_tokenizer(config)
    except UserError as error:
        yield from ((f"NOT HERE: {problem}", False) for problem in error.problems)
        return
    fits = tokenizer.fingerprint == start.facts["tokenizer"]["fingerprint"]
    yield ("" if fits else "NOT THE SAME: ") + f"tokenizer: {tokenizer.describe()}", fits


def _moved(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not (old and equals and new):
        raise UserError(f'--moved ("{text}") must be OLD=NEW, two paths or beginnings of paths')
    return str(Path(old).absolute()), str(Path(new).absolute())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="log folder, or checkpoint folder, of the run")
    parser.add_argument("--into", type=Path, metavar="FOLDER", help="for code, packages, checkpoints and logs")
    parser.add_argument(
        "--moved", action="append", default=[], metavar="OLD=NEW", help="data and files under OLD are under NEW now"
    )
    parser.add_argument("--python", metavar="PATH", help="has the packages; unset: a new environment is made")
    parser.add_argument("--code", type=Path, metavar="FOLDER", help="has the code; unset: it is checked out anew")
    return parser


if __name__ == "__main__":
    sys.exit(exit_code(main))
