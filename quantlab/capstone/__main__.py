"""The command line of the capstone: show leaderboards, and merge those of a class."""

import argparse
import sys
from collections.abc import Sequence

from quantlab.capstone.board import REFERENCES, Board, merge, read


def main(arguments: Sequence[str] | None = None) -> int:
    """python -m quantlab.capstone show [FILE ...] | merge FILE FILE ... [--out FILE]; 1 if a file is damaged."""
    parser = argparse.ArgumentParser(prog="python -m quantlab.capstone", description=__doc__)
    words = parser.add_subparsers(dest="what", required=True)
    show = words.add_parser("show", help="the leaderboard, or that of the reference recipes")
    show.add_argument("files", nargs="*", default=[REFERENCES])
    join = words.add_parser("merge", help="several leaderboards as one; every score once, the better of two")
    join.add_argument("files", nargs="+")
    join.add_argument("--out", help="a file for the result; without it, it is only shown")
    chosen = parser.parse_args(arguments)
    try:
        rows = merge(chosen.files, chosen.out) if chosen.what == "merge" else sum(map(read, chosen.files), [])
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(Board(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
