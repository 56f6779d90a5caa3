"""A recipe's score: what its file weighs, how far the model in it is from the float model, what it took to make."""

import copy
import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
from torch import Tensor, nn

from quantlab.arguments import check_choice, check_function, check_kind, check_model, kind
from quantlab.capstone.hidden import hidden_text
from quantlab.capstone.refusing import check_folder, check_made, watched
from quantlab.lm import QuantizeReport, chosen_model, divergence, load_lm, load_text, save_quantized, token_stream
from quantlab.lm import budget as tokens_for
from quantlab.lm.checkpoint import hash_tensors
from quantlab.lm.saving import WEIGHTS
from quantlab.storage import read_parts

GIVEN = 16384  # tokens of the calibration text that a recipe is given; fewer for a large model
HELD_OUT = 4096  # tokens at its end that practice() measures on


@dataclass(frozen=True)
class Budget:
    """How large a file may be, for which model, and which texts go with it."""

    name: str
    model: str  # a name for load_lm
    nbytes: int
    parameters: int  # of the model that the budget was made for; another one gets bytes in proportion
    calibration: str  # a name for load_text: what a recipe is given
    text: str  # a name for hidden_text: what it is scored on

    def limit(self, model: nn.Module) -> int:
        """The bytes for this model: as many for each parameter as the model has for which the budget was made."""
        count = sum(p.numel() for p in check_model(model).parameters())
        return self.nbytes if count == self.parameters else round(self.nbytes * count / self.parameters)


BUDGETS = {
    budget.name: budget
    for budget in (
        Budget("2.2 MB", "bundled", 2_200_000, 3_672_320, "calibration", "stories"),
        Budget("1.5 MB", "bundled", 1_500_000, 3_672_320, "calibration", "stories"),
        Budget("70 MB", "smollm2", 70_000_000, 134_515_008, "general_calibration", "general"),
    )
}


@dataclass(frozen=True)
class Score:
    """What score() found."""

    recipe: str
    who: str
    budget: str  # a name in BUDGETS
    model: str  # "bundled", "smollm2", or what QUANTLAB_MODEL named
    limit: int  # bytes allowed
    nbytes: int  # of the weights' file: codes, scales, zero points, levels, all that stays in floats, and the header
    kl: float  # nats a token, float model || this one, on the hidden text
    kl_error: float  # standard error over the windows
    top1: float  # fraction of tokens where both would say the same
    tokens: int  # predicted
    seconds: float  # that the recipe took
    cpu_seconds: float
    memory: int  # bytes that it needed at its peak above those before it, sampled 50 times a second
    text: str  # the first 12 digits of the SHA-256 of the hidden text; scores on different ones do not compare
    weights: str  # likewise of what the weights' file holds

    @property
    def fits(self) -> bool:
        """Whether the file is within the budget."""
        return self.nbytes <= self.limit

    def __str__(self) -> str:
        room = self.limit - self.nbytes
        verdict = f"{room:,} bytes below the budget" if self.fits else f"{-room:,} bytes OVER the budget: not ranked"
        return (
            f"{self.recipe}: KL {self.kl:.4f} ± {self.kl_error:.4f} on the hidden text, "
            f"same top token {self.top1:.1%}\n"
            f"{self.nbytes:,} bytes, {verdict} of {self.budget}\n"
            f"{self.seconds:.1f} s ({self.cpu_seconds:.1f} s of CPU), {self.memory / 1e6:.0f} MB of memory"
        )


def score(
    recipe: Callable | str | Path, budget: str = "2.2 MB", *, name: str | None = None, who: str = "me", on=None
) -> Score:
    """Run a recipe and measure what it made, from its file, on text that it has not read.

    recipe is a function of (model, calibration tokens), both copies, that returns what save_quantized takes, (new
    model, quantized tensors by layer name) or (new model, report), or a folder that it saved with save_quantized;
    or it is such a folder itself. The embedding may be quantized too (embedding_layers). Whatever is returned, the
    model is written to a file, its bytes are counted (all of them), and the model is read back from there and measured.

    on: (model, tokenizer) in place of the budget's own model, load_lm(BUDGETS[budget].model).
    Raises: Refused for a cheat (CHEATS); ValueError for an unknown budget, or a recipe that returns anything else;
    whatever the recipe itself raises.
    """
    limits = BUDGETS[check_choice(budget, "budget", BUDGETS)]
    name, who = _name_of(recipe, name), check_kind(who, "who", str)
    reference, tokenizer = _model_of(limits, on)
    with tempfile.TemporaryDirectory() as work, _Meter() as used:
        made = _run(recipe, reference, tokenizer, limits)
        used.stop()
        new, weights = _read_back(made, Path(work), reference, tokenizer)
        nbytes, digest = weights.stat().st_size, _fingerprint(weights)
    documents = hidden_text(limits.text)
    tokens = token_stream(tokenizer, documents)
    found = divergence(reference, new, tokens[: tokens_for(reference, len(tokens), least=2048)])
    return Score(
        recipe=name,
        who=who,
        budget=budget,
        model=_model_name(limits, on),
        limit=limits.limit(reference),
        nbytes=nbytes,
        kl=found.kl,
        kl_error=found.stderr,
        top1=found.top1,
        tokens=found.tokens,
        seconds=used.seconds,
        cpu_seconds=used.cpu_seconds,
        memory=used.memory,
        text=_digest("".join(documents).encode()),
        weights=digest,
    )


def practice(recipe: Callable, budget: str = "2.2 MB", *, on=None):
    """(bytes, Divergence) on held-out calibration text: what to choose settings by, as often as you like.

    The recipe is given what score() gives it, so it makes the same file; it is measured on the last 4,096 tokens of the
    calibration text, which it is not given. Nothing is recorded. Raises: Refused and ValueError as score does.
    """
    limits = BUDGETS[check_choice(budget, "budget", BUDGETS)]
    reference, tokenizer = _model_of(limits, on)
    made = _run(recipe, reference, tokenizer, limits)
    with tempfile.TemporaryDirectory() as work:
        new, weights = _read_back(made, Path(work), reference, tokenizer)
        nbytes = weights.stat().st_size
    held_out = token_stream(tokenizer, load_text(limits.calibration))[-HELD_OUT:]
    return nbytes, divergence(reference, new, held_out[: tokens_for(reference, len(held_out), least=1024)])


def _model_of(limits: Budget, on) -> tuple:
    """(model, tokenizer) to score on."""
    if on is None:
        return load_lm(limits.model)
    if not isinstance(on, tuple) or len(on) != 2:
        raise ValueError(f"on must be (model, tokenizer), as load_lm gives, got {kind(on)}")
    return check_model(on[0]), on[1]


def _name_of(recipe, name: str | None) -> str:
    if name is not None:
        return check_kind(name, "name", str)
    if isinstance(recipe, str | os.PathLike):
        return Path(recipe).name
    return getattr(recipe, "__name__", None) or getattr(
        getattr(recipe, "func", None), "__name__", type(recipe).__name__
    )


def _model_name(limits: Budget, on) -> str:
    if on is not None:
        return type(on[0]).__name__
    return chosen_model() if limits.model == "bundled" else limits.model


def _run(recipe, reference, tokenizer, limits: Budget):
    """What the recipe returns; a folder is returned as it is. It is handed copies, so that it cannot move the goal."""
    if isinstance(recipe, str | os.PathLike):
        return recipe
    check_function(recipe, "a recipe that is no folder", "model and tokens")
    model, tokens = copy.deepcopy(reference), given_tokens(reference, tokenizer, limits)
    with watched():
        return recipe(model, tokens)


def given_tokens(model, tokenizer, limits: Budget) -> Tensor:
    """What a recipe is given: the first tokens of the calibration text, none of those that practice() measures on."""
    tokens = token_stream(tokenizer, load_text(limits.calibration))
    return tokens[: min(tokens_for(model, GIVEN, least=HELD_OUT), len(tokens) - HELD_OUT)]


def _read_back(made, work: Path, reference, tokenizer) -> tuple:
    """(the model that its folder holds, the file with its weights): what was made counts only as it is stored."""
    folder = _as_folder(made, work / "entry", reference)
    return check_folder(folder, reference, tokenizer), folder / WEIGHTS


def _as_folder(made, folder: Path, reference) -> Path:
    """The folder of what a recipe made, saved here unless it is one already."""
    if isinstance(made, str | os.PathLike):
        return Path(made)
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], nn.Module):
        raise ValueError(f"a recipe returns (model, quantized tensors by name) or a folder, got {kind(made)}")
    model, codes = made
    check_made(model, reference)
    codes = codes.qtensors if isinstance(codes, QuantizeReport) else check_kind(codes, "the second", Mapping)
    save_quantized(folder, model, codes)
    return folder


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def _fingerprint(path: Path) -> str:
    """Of the tensors and their settings; the bytes of two such files may differ, as a header has no order."""
    metadata, parts = read_parts(path)
    return hash_tensors(dict(sorted(parts.items())), about=metadata["tensors"])[:12]


class _Meter:
    """Seconds, CPU seconds and the peak of memory until stop()."""

    def __enter__(self):
        self._process, self._ended, self._peak = psutil.Process(), threading.Event(), 0
        self._before = self._process.memory_info().rss
        self._began, self._cpu = time.perf_counter(), time.process_time()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()
        return self

    def _sample(self) -> None:
        while not self._ended.wait(0.02):
            self._peak = max(self._peak, self._process.memory_info().rss)

    def stop(self) -> None:
        if not self._ended.is_set():
            self.seconds, self.cpu_seconds = time.perf_counter() - self._began, time.process_time() - self._cpu
            self._ended.set()
            self._sampler.join()
            self.memory = max(0, self._peak - self._before, self._process.memory_info().rss - self._before)

    def __exit__(self, *_error) -> None:
        self.stop()
