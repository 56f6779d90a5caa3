"""Get llama.cpp, as Node's package node-llama-cpp with its CPU binary only: no compiler, no GPU, 80 MB, half a minute.

    python -m recipes.llama_cpp          installs into .llama_cpp beside this folder, or says that it is there

Node 20 or later must be installed (nodejs.org). No script of a package is run.
"""

import json
import platform
import shutil
import subprocess
import sys
import time

from quantlab.export.llama_cpp import FOLDER, llama_cpp_here

VERSION = "3.21.1"
BINARIES = {
    ("Linux", "x86_64"): "linux-x64", ("Linux", "aarch64"): "linux-arm64", ("Darwin", "arm64"): "mac-arm64-metal",
    ("Darwin", "x86_64"): "mac-x64", ("Windows", "AMD64"): "win-x64", ("Windows", "ARM64"): "win-arm64",
}  # fmt: skip


def main() -> None:
    installed = FOLDER / "node_modules" / "node-llama-cpp" / "package.json"
    if llama_cpp_here() and json.loads(installed.read_text())["version"] == VERSION:
        return print(f"llama.cpp is there: {FOLDER}")
    npm, binary = shutil.which("npm"), BINARIES.get((platform.system(), platform.machine()))
    if npm is None:
        sys.exit("Node's npm is not on the path: install Node 20 or later (nodejs.org), then run this again.")
    if binary is None:
        sys.exit(f"node-llama-cpp has no binary for {platform.system()} on {platform.machine()}.")
    FOLDER.mkdir(exist_ok=True)
    packages = [f"node-llama-cpp@{VERSION}", f"@node-llama-cpp/{binary}@{VERSION}"]
    options = ["--save-exact", "--omit=optional", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    began = time.perf_counter()
    subprocess.run([npm, "install", "--prefix", str(FOLDER), *options, *packages], check=True)
    size = sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file())
    print(f"llama.cpp: {size / 1e6:.0f} MB in {FOLDER}, {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
