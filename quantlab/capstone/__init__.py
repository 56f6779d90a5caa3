"""Fit the budget: the best model in so many bytes, scored on text that its maker has not read.

score(recipe, "2.2 MB")      run a recipe, write its model to a file, count the file, measure the model in it
practice(recipe, "2.2 MB")   the same on text that is known: to choose settings by, as often as you like
append, read, merge, best    the leaderboard; python -m quantlab.capstone merge a.jsonl b.jsonl
REFERENCE                    five recipes to beat, in quantlab/capstone/recipes.py
"""

from quantlab.capstone.board import REFERENCES, Board, append, best, merge, read
from quantlab.capstone.hidden import hidden_text, seal, unseal, write_hidden
from quantlab.capstone.planning import Plans, plans
from quantlab.capstone.recipes import (
    REFERENCE,
    beside,
    by_method,
    by_part,
    gptq,
    in_groups,
    mixed_gptq,
    nearest,
    nf4,
    qat,
    quantize_embeddings,
)  # fmt: skip
from quantlab.capstone.refusing import CHEATS, Refused
from quantlab.capstone.scoring import BUDGETS, Budget, Score, practice, score

__all__ = [
    "BUDGETS", "CHEATS", "REFERENCE", "REFERENCES", "Board", "Budget", "Plans", "Refused", "Score", "append",
    "beside", "best", "by_method", "by_part", "gptq", "hidden_text", "in_groups", "merge", "mixed_gptq", "nearest",
    "nf4", "plans", "practice", "qat", "quantize_embeddings", "read", "score", "seal", "unseal", "write_hidden",
]  # fmt: skip
