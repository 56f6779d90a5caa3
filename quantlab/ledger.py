"""The learner's ledger: one measured row for each way of quantizing the model, kept in a CSV file."""

import csv
import os
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from quantlab.lm import QuantizeReport, divergence, model_bytes, perplexity


@dataclass(frozen=True)
class Row:
    """One way of quantizing a model, measured. Errors are standard errors, latencies ratios to the float model."""

    method: str
    bits: int  # 32 for the float model
    group: str  # group size, "row" or "tensor", "-" for the float model
    perplexity: float
    perplexity_error: float
    kl: float  # nats per token, float model || this model
    kl_error: float
    top1: float  # fraction of tokens
    bits_per_weight: float  # all bytes of the model over all parameters
    bytes: int  # packed layers, the rest in 16 bits
    prefill: float  # time to read 256 tokens, over the float model's in the same run
    decode: float  # time to say a token, likewise
    seconds: float  # to quantize
    calibration_tokens: int


def measure(
    reference,
    model,
    tokens: Tensor,
    *,
    method: str,
    bits: int = 32,
    group: str = "-",
    report: QuantizeReport | None = None,
    qtensors: dict | None = None,
    window: int = 512,
) -> Row:
    """A ledger row: model against the float model `reference` on the same tokens, in the same run.

    report is what quantize_lm returned, or qtensors what quantize_weights did: the packed layers then count with
    their own bytes, all else in 16 bits. Without either the whole model counts as 16-bit floats.
    """
    p, d = perplexity(model, tokens, window=window), divergence(reference, model, tokens, window=window)
    slow, fast = _latencies(reference, model, tokens)
    size = report.nbytes if report else model_bytes(model, qtensors)
    return Row(
        method,
        bits,
        group,
        p.value,
        p.stderr,
        d.kl,
        d.stderr,
        d.top1,
        8 * size / sum(w.numel() for w in reference.parameters()),
        size,
        slow,
        fast,
        report.seconds if report else 0.0,
        report.calibration_tokens if report else 0,
    )


def _latencies(reference, model, tokens: Tensor) -> tuple[float, float]:
    """Times of model over those of reference: (prefill, decode). The least of rounds taken in turns.

    Whatever else runs on the machine only adds time, so the least is nearest to the truth.
    """
    prompt, least = tokens[None, :256].to(model.device), {}
    for _ in range(5):
        for name, m in (("reference", reference), ("model", model)):
            times = _read_and_say(m, prompt)
            least[name] = [min(pair) for pair in zip(times, least.get(name, times), strict=True)]
    return tuple(m / r for m, r in zip(least["model"], least["reference"], strict=True))


def _read_and_say(model, prompt: Tensor) -> tuple[float, float]:
    """Seconds to read the prompt, and to say a token after it (the least of four)."""
    with torch.no_grad():
        start = time.perf_counter()
        cache = model(prompt, use_cache=True).past_key_values
        prefill, steps = time.perf_counter() - start, []
        for _ in range(4):
            start = time.perf_counter()
            cache = model(prompt[:, -1:], past_key_values=cache, use_cache=True).past_key_values
            steps.append(time.perf_counter() - start)
    return prefill, min(steps)


def append(row: Row, path="ledger.csv") -> list[Row]:
    """Write a row to the ledger, in place of an older one of the same method, bits and group; returns all rows."""
    path = Path(path)
    row = Row(**{f.name: f.type(getattr(row, f.name)) for f in fields(Row)})  # as it will be read back
    with FileLock(f"{path}.lock"):  # two notebooks may write at the same time
        rows = [r for r in (read(path) if path.exists() else []) if _key(r) != _key(row)] + [row]
        part = path.with_suffix(".part")
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(r) for r in rows)
        os.replace(part, path)  # written whole or not at all
    return rows


def read(path="ledger.csv") -> list[Row]:
    """The rows of a ledger. Raises FileNotFoundError if there is none, ValueError if it is not a ledger."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != [f.name for f in fields(Row)]:
            raise ValueError(f"{path} is not a ledger: its columns are {reader.fieldnames}")
        return [Row(**{f.name: f.type(line[f.name]) for f in fields(Row)}) for line in reader]


def compare(row: Row, other: Row) -> dict[str, float]:
    """row over other, as ratios (1: as large; below 1: smaller), and how sure the difference in KL is.

    kl_sigmas: the difference of the two KLs over the standard error of that difference, were they independent. Both
    models read the same text, so that it errs on the safe side. Raises: ValueError if other's KL is 0.
    """
    if other.kl == 0:
        raise ValueError(f"{other.method} is the float model: its KL of 0 leaves no ratio")
    ratios = {name: getattr(row, name) / getattr(other, name) for name in ("kl", "perplexity", "bytes", "prefill")}
    spread = (row.kl_error**2 + other.kl_error**2) ** 0.5
    return ratios | {"kl_sigmas": (row.kl - other.kl) / spread if spread else float("nan")}


def pareto(rows: list[Row]) -> list[Row]:
    """The rows worth having, smallest first: no other is at most as large and loses at most as much."""
    best, least = [], float("inf")
    for row in sorted(rows, key=lambda r: (r.bits_per_weight, r.kl)):
        if row.kl < least:
            best.append(row)
            least = row.kl
    return best


def _key(row: Row) -> tuple:
    return row.method, row.bits, row.group


@dataclass(frozen=True)
class Table:
    """The rows as a notebook shows them."""

    rows: list

    def __repr__(self) -> str:
        head = ("method", "bits", "group", "perplexity ±", "KL ±", "top-1", "bits/w", "kB", "prefill", "decode", "s")
        widths = (max([12, *(len(r.method) for r in self.rows)]), 4, 6, 13, 16, 6, 6, 6, 7, 6, 5)
        lines = [
            (r.method, f"{r.bits}", r.group, f"{r.perplexity:.2f} {r.perplexity_error:.2f}",
             f"{r.kl:.4f} {r.kl_error:.4f}", f"{r.top1:.1%}", f"{r.bits_per_weight:.2f}", f"{r.bytes / 1000:.0f}",
             f"{r.prefill:.2f}x", f"{r.decode:.2f}x", f"{r.seconds:.1f}")
            for r in self.rows
        ]  # fmt: skip
        lines = ["  ".join(f"{text:>{w}}" for text, w in zip(row, widths, strict=True)) for row in (head, *lines)]
        return "\n".join(lines)
