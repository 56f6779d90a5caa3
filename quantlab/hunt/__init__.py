"""The bug hunt: 43 programs that run, look right and print something convincing. Ten of them are right.

One file a room (ranges, codebooks, integers, measuring, training, tools). In each, a class is a drawer: its docstring
is what the program promises, `program` is what is shown, `mended` and `mended_again` keep the promise in two ways.
Who looks in there has found the answers, and nothing else.
"""

from quantlab.hunt.atlas import atlas
from quantlab.hunt.playing import hint, program, restart, resume, reveal, save, score, show, verdict

__all__ = ["atlas", "hint", "program", "restart", "resume", "reveal", "save", "score", "show", "verdict"]
