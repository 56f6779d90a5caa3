"""How many tokens does GPTQ need on SmolLM2, and in which layers does it show?   Writes data/calibration-smollm2.csv.

4 bits, groups of 128, calibrated on the first 1,024, 2,048, 4,096 and 16,384 tokens of the general calibration text;
none is rounding to nearest. KL on the 2,048 tokens of the ledger; each layer's output error on the tokens read, and on
the 2,048 that follow those of the ledger: medians over the layers with as many inputs. Then, for the fewest tokens,
GPTQ in the layers of one width alone, the others rounded to nearest.

python benchmarks/calibration_tokens.py [--out FILE]      ten minutes; it fails if few tokens do not overfit
"""

import argparse
import csv
import io
import sys
from pathlib import Path
from statistics import median

from tqdm.auto import tqdm

from quantlab.files import write_whole
from quantlab.lm import DATA, divergence, linear_layers, load_lm, load_text, quantize_lm, token_stream
from quantlab.lm.walk import with_codes
from quantlab.methods import GPTQ, RTN

COUNTS, TEST = (1024, 2048, 4096, 16384), 2048
COLUMNS = ["tokens", "layers", "inputs", "read", "held_out", "kl", "kl_error"]


def rows_of(model, count: int, report, kl) -> list[dict]:
    """A row for each width of layer: the medians of its output errors, and the model's KL."""
    layers, rows = linear_layers(model), []
    for width in sorted({layer.weight.shape[1] for layer in layers.values()}):
        some = [row for row in report.layers if layers[row.name].weight.shape[1] == width]
        read = median(row.output_error for row in some) if count else ""
        apart = median(row.held_out_error for row in some)
        rows.append(dict(zip(COLUMNS, (count, "all", width, read, apart, kl.kl, kl.stderr), strict=True)))
    return rows


def mixtures(model, test, narrow: int, wide: int, by_gptq: dict, nearest: dict, count: int) -> list[dict]:
    """KL with GPTQ in the layers of one width alone."""
    layers, rows = linear_layers(model), []
    for width in (narrow, wide):
        codes = {n: (by_gptq if layers[n].weight.shape[1] == width else nearest)[n] for n in layers}
        kl = divergence(model, with_codes(model, codes)[0], test)
        rows.append(dict(zip(COLUMNS, (count, f"{width} inputs", width, "", "", kl.kl, kl.stderr), strict=True)))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help=f"the file for the table, {DATA.name}/calibration-smollm2.csv say")
    out = parser.parse_args().out
    try:
        model, tokenizer = load_lm("smollm2")
    except FileNotFoundError as why:
        print("not measured:", why)
        return 0
    read, general = (token_stream(tokenizer, load_text(name)) for name in ("general_calibration", "general"))
    test, apart = general[:TEST], general[TEST : 2 * TEST]
    rows, codes = [], {}
    for count in tqdm((0, *COUNTS), desc="walks"):
        method = GPTQ(bits=4, group_size=128) if count else RTN(bits=4, group_size=128)
        new, report = quantize_lm(model, read[:count] if count else None, method, held_out=apart, progress=False)
        codes[count] = report.qtensors
        rows += rows_of(model, count, report, divergence(model, new, test))
    narrow, *_, wide = sorted({row["inputs"] for row in rows})
    rows += mixtures(model, test, narrow, wide, codes[COUNTS[0]], codes[0], COUNTS[0])
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    print(table.getvalue())
    if out is not None:
        write_whole(out, table.getvalue())
    whole = [row for row in rows if row["layers"] == "all"]
    few, many = ([row for row in whole if row["tokens"] == count] for count in (COUNTS[0], COUNTS[-1]))
    return int(not all(row["held_out"] > 1.5 * row["read"] for row in few) or many[0]["kl"] > few[0]["kl"])


if __name__ == "__main__":
    sys.exit(main())
