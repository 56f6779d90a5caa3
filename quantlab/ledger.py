"""The learner's ledger: one measured row for each way of quantizing the model, kept in a CSV file."""

import csv
import io
import time
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple, get_args

import torch
from filelock import FileLock
from torch import Tensor

from quantlab.arguments import check_int, check_kind, check_number, check_path
from quantlab.files import write_whole
from quantlab.lm import QuantizeReport, model_bytes, perplexity_and_divergence
from quantlab.lm.measuring import checked_windows
from quantlab.lm.report import left_in_float, left_in_float_note

LATER = {"left_in_float", "cache_bytes"}  # columns that the first ledgers have not


@dataclass(frozen=True)
class Row:
    """One way of quantizing a model, measured. Errors are standard errors, latencies ratios to the float model.

    None: not measured, as latencies are not where the arithmetic is the float model's.
    """

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
    prefill: float | None = None  # time to read 256 tokens, over the float model's in the same run
    prefill_spread: float | None = None  # standard deviation over the rounds
    decode: float | None = None  # time to write a token, likewise
    decode_spread: float | None = None
    seconds: float | None = None  # to quantize, or to train
    calibration_tokens: int | None = None  # looked at to quantize, or to train
    left_in_float: float | None = None  # fraction of the blocks' weights that no quantized layer holds
    cache_bytes: int | None = None  # keys and values of the longest window, where a KVCache holds them


class Latency(NamedTuple):
    """Times over those of the float model in the same run, and their standard deviation over the rounds."""

    prefill: float
    prefill_spread: float
    decode: float
    decode_spread: float


def measure(
    reference, model, tokens: Tensor, *, method: str, bits: int = 32, group: str = "-",
    report: QuantizeReport | None = None, qtensors: dict | None = None, window: int = 512,
    seconds: float | None = None, calibration_tokens: int | None = None,
) -> Row:  # fmt: skip
    """A ledger row: model against the float model `reference` on the same tokens, in the same run.

    report is what quantize_lm returned, or qtensors what quantize_weights did: the packed layers then count with
    their own bytes, all else in 16 bits. Without either the whole model counts as 16-bit floats. Latencies are measured
    where the model computes otherwise than the reference: weights that are floats on a grid take a float's time.
    """
    method, bits, group = check_kind(method, "method", str), check_int(bits, "bits", 1), check_kind(group, "group", str)
    if report is not None:
        check_kind(report, "report", QuantizeReport)
        seconds, calibration_tokens = report.seconds, report.calibration_tokens
    seconds = seconds if seconds is None else check_number(seconds, "seconds", low=0)
    read = calibration_tokens if calibration_tokens is None else check_int(calibration_tokens, "calibration_tokens", 0)
    p, d = perplexity_and_divergence(reference, model, tokens, window=window)
    size = report.nbytes if report else model_bytes(model, qtensors)
    return Row(
        method=method,
        bits=bits,
        group=group,
        perplexity=p.value,
        perplexity_error=p.stderr,
        kl=d.kl,
        kl_error=d.stderr,
        top1=d.top1,
        bits_per_weight=8 * size / sum(w.numel() for w in reference.parameters()),
        bytes=size,
        seconds=seconds,
        calibration_tokens=read,
        left_in_float=_left_in_float(model, report, qtensors),
        cache_bytes=getattr(model, "cache_bytes", None),
        **(latency(reference, model, tokens)._asdict() if computes_otherwise(reference, model) else {}),
    )


def _left_in_float(model, report: QuantizeReport | None, qtensors: dict | None) -> float | None:
    """None where nothing says which layers are quantized."""
    if report is not None:
        return report.left_in_float
    packed = any(hasattr(m, "nbytes") for m in model.modules())
    return left_in_float(model, qtensors or {}) if packed or qtensors else None


def computes_otherwise(reference, model) -> bool:
    """Whether the model has other kinds of layers than the reference."""
    return {type(m) for m in model.modules()} != {type(m) for m in reference.modules()}


def latency(reference, model, tokens: Tensor, *, rounds: int = 6) -> Latency:
    """Seconds of model over those of reference, to read 256 tokens and to write one, in turns, after a warm-up.

    Whatever else runs on the machine only adds time, so the ratio is that of the least times, nearest to the truth.
    """
    rounds = check_int(rounds, "rounds", 2, 1000)
    # Four tokens are written after the prompt, and a short context must hold them too.
    most = min(256, *(checked_windows(m, tokens, 260, None)[0] - 4 for m in (reference, model)))
    if most < 1:
        raise ValueError("a model that reads fewer than 5 tokens has no latency to measure")
    prompt = tokens[None, :most].to(model.device)
    times = [[_read_and_write(m, prompt) for m in (reference, model)] for _ in range(rounds + 1)][1:]
    times = torch.tensor(times, dtype=torch.float64)  # (rounds, reference or model, prefill or decode)
    ratio, spread = (times.amin(0)[1] / times.amin(0)[0]).tolist(), (times[:, 1] / times[:, 0]).std(0).tolist()
    return Latency(ratio[0], spread[0], ratio[1], spread[1])


def _read_and_write(model, prompt: Tensor) -> tuple[float, float]:
    """Seconds to read the prompt, and to write a token after it (the least of four)."""
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
    """Write a row to the ledger, in place of an older one of the same method, bits and group; returns all rows.

    Raises: FileNotFoundError if there is no such folder, ValueError if the file there is no ledger.
    """
    path, row = check_path(path), check_kind(row, "row", Row, "measure gives")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent}")
    with FileLock(f"{path}.lock"):  # two notebooks may write at the same time
        rows = [r for r in (read(path) if path.exists() else []) if _key(r) != _key(row)]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(r) for r in [*rows, row])
        write_whole(path, text.getvalue())
    return read(path)


def read(path="ledger.csv") -> list[Row]:
    """The rows of a ledger. Raises FileNotFoundError if there is none, ValueError if it is not a ledger or damaged."""
    path = check_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no ledger {path}")
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:  # a spreadsheet puts a mark before it
        reader = csv.DictReader(file)
        columns, needed = reader.fieldnames or [], [f.name for f in fields(Row) if f.name not in LATER]
        if columns[: len(needed)] != needed or set(columns) - {f.name for f in fields(Row)}:
            raise ValueError(f"{path} is not a ledger: its columns are {reader.fieldnames}")
        return [row_of(line, f"{path}, line {number}") for number, line in enumerate(reader, 2)]


def row_of(values: dict, where: str = "a row") -> Row:
    """A row from texts or numbers by column. Raises ValueError, naming where, if one is missing or no number."""
    found = {}
    for field in fields(Row):
        kinds, value = get_args(field.type) or (field.type,), values.get(field.name)
        try:
            found[field.name] = None if value in ("", None) and type(None) in kinds else kinds[0](value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where} is damaged: {field.name} is {value!r}") from error
    return Row(**found)


def compare(row: Row, other: Row) -> dict[str, float]:
    """row over other, as ratios (1: as large; below 1: smaller), and how sure the difference in KL is.

    kl_sigmas: the difference of the two KLs over the standard error of that difference, were they independent. Both
    models read the same text, so that it errs on the safe side. Raises: ValueError if other's KL is 0.
    """
    check_kind(row, "row", Row, "measure gives")
    if check_kind(other, "other", Row, "measure gives").kl == 0:
        raise ValueError(f"{other.method} is the float model: its KL of 0 leaves no ratio")
    names = ("kl", "perplexity", "bytes", "prefill")
    both = [name for name in names if None not in (getattr(row, name), getattr(other, name))]
    ratios = {name: getattr(row, name) / getattr(other, name) for name in both}
    spread = (row.kl_error**2 + other.kl_error**2) ** 0.5
    return ratios | {"kl_sigmas": (row.kl - other.kl) / spread if spread else float("nan")}


def _key(row: Row) -> tuple:
    return row.method, row.bits, row.group


@dataclass(frozen=True)
class Table:
    """The rows as a notebook shows them."""

    rows: list

    def __repr__(self) -> str:
        head = ("method", "bits", "group", "perplexity ±", "KL ±", "top-1", "bits/w", "kB",
                "prefill ±", "decode ±", "s", "tokens")  # fmt: skip
        widths = (max([12, *(len(r.method) for r in self.rows)]), 4, 6, 13, 13, 6, 6, 6, 9, 9, 5, 6)
        lines = [
            (r.method, f"{r.bits}", r.group, f"{r.perplexity:.2f} {r.perplexity_error:.2f}",
             f"{r.kl:.4f} {r.kl_error:.4f}", f"{r.top1:.1%}", f"{r.bits_per_weight:.2f}", f"{r.bytes / 1000:.0f}",
             _ratio(r.prefill, r.prefill_spread), _ratio(r.decode, r.decode_spread),
             "–" if r.seconds is None else f"{r.seconds:.2f}" if r.seconds < 10 else f"{r.seconds:.0f}",
             "–" if r.calibration_tokens is None else f"{r.calibration_tokens}")
            for r in self.rows
        ]  # fmt: skip
        lines = ["  ".join(f"{text:>{w}}" for text, w in zip(row, widths, strict=True)) for row in (head, *lines)]
        lines += [f"{r.method}, {r.bits} bits: {r.cache_bytes / 1000:.0f} kB of keys and values" for r in self.rows
                  if r.cache_bytes]  # fmt: skip
        left = [r for r in self.rows if r.left_in_float and r.left_in_float >= 0.005]
        lines += [f"{r.method}, {r.bits} bits: {left_in_float_note(r.left_in_float)}" for r in left]
        return "\n".join(lines)


def _ratio(value: float | None, spread: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if spread is None else f"{value:.2f} {spread:.2f}"
