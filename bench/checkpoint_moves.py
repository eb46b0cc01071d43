"""Move checkpoints between layouts and write the table of docs/checkpoints.md.

    python bench/checkpoint_moves.py            all moves; writes the table
    python bench/checkpoint_moves.py 0 6        two moves; prints only

Takes about 10 minutes on two cores. Moves and measurements are defined in tests/ranks/moves.py.
"""

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests import tiny  # noqa: E402
from tests.ranks.moves import MOVES, carry_out, describe, layout_name  # noqa: E402
from tests.ranks.run import can_run  # noqa: E402

PAGE = ROOT / "docs" / "checkpoints.md"
BEGIN, END = "<!-- moves: begin -->\n", "<!-- moves: end -->\n"


def main() -> None:
    """Carry out the moves and write the table into the page."""
    parser = argparse.ArgumentParser(description="move checkpoints between layouts")
    parser.add_argument("moves", nargs="*", type=int, help=f"numbers of moves, 0 to {len(MOVES) - 1}; none: all")
    chosen = parser.parse_args().moves
    rows = ["| from | to | of | state | next loss | 4 losses | noise |", "|---|---|---|---|---|---|---|"]
    for move in [MOVES[number] for number in chosen] or MOVES:
        if not can_run(ranks := max(tiny.ranks_of(settings) for settings in (move.source, move.target))):
            print(f"skipped: {move} needs {ranks} GPUs", file=sys.stderr, flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            outcome = carry_out(move, Path(folder))
        state = "same bits" if outcome.same_bits else "DIFFERS"
        kind = describe(move.common).strip(" ()") or "fp32"
        gaps = " | ".join(f"{gap:.1e}" if gap else "0" for gap in (outcome.next_gap, outcome.gap, outcome.noise))
        rows.append(f"| {layout_name(move.source)} | {layout_name(move.target)} | {kind} | {state} | {gaps} |")
        print(rows[-1], flush=True)
    if not chosen:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(before + BEGIN + "\n".join(rows) + "\n" + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
