"""The workbook as a static site, whose sliders move without a kernel:  python run.py site --help

1. Films: the notebooks are run up to their last explorer, and every explorer's pictures are drawn ahead (.films/).
2. Pages: the built notebooks, the API, the ledger and the glossary become pages that Sphinx reads.
3. Sphinx writes build/site/html, which any web server can serve; nothing in it asks another host for anything.
"""

import argparse
import functools
import http.server
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

from recipes import filming, site_pages
from recipes.notebooks import NOTEBOOKS, notebook_of

STATIC = Path(__file__).resolve().parent / "site_static"
BUILT = filming.ROOT / "build/site"
PAGES = ("film.js", "table.js", "site.css", "icon.svg")
LARGEST_SITE = 40_000_000  # bytes of all films


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python run.py site", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="how the chapters' names begin (01 10_gptq); none means all")
    parser.add_argument("--out", type=Path, default=BUILT, help="folder to write to (build/site)")
    parser.add_argument("--serve", type=int, metavar="PORT", help="serve it afterwards, on this machine alone")
    options = parser.parse_args(arguments)
    sources = [s for s in sorted(NOTEBOOKS.glob("src/*.py")) if s.name.startswith(tuple(options.names or [""]))]
    if not sources:
        parser.error(f"no chapter begins with {' or '.join(options.names)}")
    status = build(sources, options.out)
    if options.serve and not status:
        serve(options.out / "html", options.serve)
    return status


def build(sources: list[Path], out: Path) -> int:
    """Build the site of these chapters in out/html; the status is 0 when all went well."""
    began = time.time()
    print(f"[1/3] films of {len(sources)} notebooks", flush=True)
    failed = make_films(sources)
    if failed:
        print(f"no films of {', '.join(failed)}", file=sys.stderr)
        return 1
    print(f"[2/3] pages ({time.time() - began:.0f} s so far)", flush=True)
    write_pages(sources, out / "source")
    print(f"[3/3] Sphinx ({time.time() - began:.0f} s so far)", flush=True)
    shutil.rmtree(out / "html", ignore_errors=True)
    status = subprocess.call([sys.executable, "-m", "sphinx", "-q", "-b", "html", "-d", out / "doctrees",
                              out / "source", out / "html"])  # fmt: skip
    films = sum(path.stat().st_size for path in (out / "html/_static/films").rglob("*.*"))
    print(f"{out / 'html'}: films of {films / 1e6:.1f} MB; {time.time() - began:.0f} s", flush=True)
    return status or int(films > LARGEST_SITE)


def make_films(sources: list[Path]) -> list[str]:
    """Make the films of each source, one for each core at a time; the names of those that failed."""

    def make(source: Path) -> str | None:
        began = time.time()
        if (filming.folder_of(source) / filming.DONE).exists():
            return None
        try:
            filming.make(source)
        except (CellExecutionError, CellTimeoutError, DeadKernelError, RuntimeError) as error:
            print(f"      {source.stem}: {error}", file=sys.stderr, flush=True)
            return source.stem
        print(f"      {source.stem}: filmed, {time.time() - began:.0f} s", flush=True)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return [name for name in pool.map(make, sources) if name]


def write_pages(sources: list[Path], folder: Path) -> None:
    """What Sphinx reads, from nothing."""
    shutil.rmtree(folder, ignore_errors=True)
    films, stems = folder / "_static/films", [source.stem for source in sources]
    for name in ("chapters", "api"):
        (folder / name).mkdir(parents=True)
    for source in sources:
        shutil.copytree(filming.folder_of(source), films / source.stem, ignore=shutil.ignore_patterns(filming.DONE))
    for name in PAGES:
        shutil.copy(STATIC / name, folder / "_static" / name)
    shutil.copy(STATIC / "conf.py", folder / "conf.py")
    for source in sources:
        page = site_pages.chapter(notebook_of(source), films, set(stems))
        nbformat.write(page, folder / f"chapters/{source.stem}.ipynb")
    texts = {
        "index": site_pages.first_page(films, stems),
        "glossary": site_pages.glossary(),
        "ledger": site_pages.ledger_page(folder),
    }
    texts |= {f"api/{name}": text for name, text in site_pages.api().items()}
    for name, text in texts.items():
        (folder / f"{name}.md").write_text(text, encoding="utf-8")


def serve(folder: Path, port: int) -> None:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        print(f"http://127.0.0.1:{port}/   (Ctrl-C ends it)", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    sys.exit(main())
