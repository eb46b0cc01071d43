"""Train every layout of tests/ranks/layouts.py against one rank, and write the table of docs/layouts.md.

    python bench/layouts.py            prints the table
    python bench/layouts.py --quick    only of small models like Gemma, BLOOM and Falcon, each with every arrangement
    python bench/layouts.py --write    writes the table of all into docs/layouts.md

Takes about ten minutes on two cores. With RANKS_BACKEND=nccl the ranks are GPUs, and layouts with more ranks
than GPUs are skipped.
"""

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests import tiny  # noqa: E402
from tests.ranks.layouts import carry_out, cases, cases_of_families, learn_references, row  # noqa: E402
from tests.ranks.run import BACKEND, can_run  # noqa: E402

PAGE = ROOT / "docs" / "layouts.md"
BEGIN, END = "<!-- layouts: begin -->\n", "<!-- layouts: end -->\n"
HEAD = "| layout | precision | model and step | largest gap of 20 losses | bound | holds |\n|---|---|---|---|---|---|\n"


def main() -> None:
    """Carry out every case; with --write, update the page."""
    parser = argparse.ArgumentParser(description="compare every layout with one rank")
    parser.add_argument("--write", action="store_true", help=f"write the table into {PAGE.name}")
    parser.add_argument("--quick", action="store_true", help="the models of other families only")
    arguments = parser.parse_args()
    if arguments.quick and arguments.write:
        parser.error("--write writes the whole table; leave --quick out")
    wanted = cases_of_families() if arguments.quick else (*cases(), *cases_of_families())
    print(HEAD, end="")
    chosen, rows = [case for case in wanted if can_run(tiny.ranks_of(case.settings()))], []
    learn_references(chosen)
    for case in chosen:
        rows.append(row(case, carry_out(case)) + "\n")
        print(rows[-1], end="", flush=True)
    if arguments.write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        made = f"{len(rows)} layouts over {BACKEND}, torch {torch.__version__.split('+')[0]}.\n\n"
        PAGE.write_text(before + BEGIN + made + HEAD + "".join(rows) + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
