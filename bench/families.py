"""Compare every Hugging Face family with transformers, as tests/ranks/test_families.py does, for docs/models.md.

    python bench/families.py            prints the table
    python bench/families.py --write    and writes it into docs/models.md

Takes about a minute on two cores.
"""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.families import (  # noqa: E402
    ALL,
    CASES,
    PIPELINES,
    Measurements,
    check_settings_return,
    check_weights_return,
    family_named,
)
from tests.ranks.family_checks import BOUND, Figures  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- families: begin -->\n", "<!-- families: end -->\n"
CHECKS = ("logits, tp 1", "logits, tp 2", "loss, pp 2", "gradients", "decoding, tp 1", "decoding, tp 2")
HEAD = (
    f"| family | `model_type` | small models | {' | '.join(CHECKS)} | weights and settings back |\n"
    f"|---|---|---|{'---|' * len(CHECKS)}---|\n"
)


def main() -> int:
    """Measure every family; with --write, update the page. 1 if one is beyond its bound."""
    parser = argparse.ArgumentParser(description="compare every family with transformers")
    parser.add_argument("--write", action="store_true", help=f"write the table into {PAGE.name}")
    arguments = parser.parse_args()
    rows, held = [], True
    with TemporaryDirectory() as folder:
        measurements = Measurements(Path(folder), ALL)
        for family, variants in CASES.items():
            cases = [case for case in ALL if case.family == family]
            largest: Figures = {}
            for case in cases:
                check_weights_return(case)
                check_settings_return(case)
                layouts = [(1, 1), (2, 1), *([(2, 2)] if case in PIPELINES else [])]
                for figures in (measurements.of(case, *layout) for layout in layouts):
                    largest |= {check: max(gap, largest.get(check, 0.0)) for check, gap in figures.items()}
            held = held and max(largest.values()) <= BOUND
            gaps = " | ".join(f"{largest[check]:.0e}" if check in largest else "" for check in CHECKS)
            rows.append(f"| {family_named(family).name} | `{family}` | {len(variants)} | {gaps} | exact |\n")
    print(HEAD + "".join(rows), end="")
    if arguments.write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        made = f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}, fp32 on a CPU.\n\n"
        PAGE.write_text(before + BEGIN + made + HEAD + "".join(rows) + END + rest.partition(END)[2])
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
