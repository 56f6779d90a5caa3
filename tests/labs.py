"""JupyterLab on a free port, and its notebooks in a Chromium that has no window."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from playwright.sync_api import Browser, Locator, Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # keeps cells out of sight in the page
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},  # asks nothing
}
START = 120  # seconds that a busy machine may need to start JupyterLab, or to open a notebook

# JavaScript. Every picture of a page is known by a hash of its bytes, be it a data: or a blob: address.
HASH = """async address => {
    const bytes = await (await fetch(address)).arrayBuffer();
    const hash = new Uint8Array(await crypto.subtle.digest('SHA-1', bytes));
    return [...hash].map(byte => byte.toString(16).padStart(2, '0')).join('');
}"""
IDLE = """() => {
    const panel = window.jupyterapp?.shell.currentWidget;
    return panel?.context?.isReady && panel.sessionContext.session?.kernel?.status === 'idle';
}"""
RUN_ALL = """() => {
    window.ran = false;
    const end = () => window.ran = true;
    jupyterapp.commands.execute('notebook:run-all-cells').then(end, end);
}"""
PROGRESS = """() => {
    const {content, sessionContext} = jupyterapp.shell.currentWidget;
    const cells = content.widgets.map(cell => cell.model);
    const code = cells.filter(cell => cell.type === 'code' && cell.sharedModel.getSource().trim());
    const done = code.filter(cell => cell.executionCount).length;
    const idle = window.ran && sessionContext.session.kernel.status === 'idle';
    return {done, idle, complete: idle && done === code.length};
}"""
WATCH = """() => {
    window.raised = [];
    jupyterapp.shell.currentWidget.sessionContext.session.kernel.iopubMessage.connect((_, message) => {
        const {ename, evalue} = message.content;
        if (message.header.msg_type === 'error') window.raised.push(`${ename}: ${evalue}`);
    });
}"""
CONTENT = "() => jupyterapp.shell.currentWidget.content.model.toJSON()"
SHUT_DOWN = "() => jupyterapp.shell.currentWidget.sessionContext.shutdown()"


def find_chromium() -> str | None:
    """The path in CHROMIUM, or of the first browser found."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=FLAGS)
        yield browser
        browser.close()


@dataclass(frozen=True)
class Lab:
    port: int
    token: str

    def address(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}/{path}?token={self.token}"


@contextmanager
def jupyterlab(root: Path) -> Iterator[Lab]:
    """JupyterLab in the folder root, with nothing of the user's own: no settings, no extensions."""
    lab = Lab(_free_port(), secrets.token_hex(16))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        log = Path(home) / "log"
        with log.open("w") as file:
            process = subprocess.Popen(
                _command(lab, root),
                env=_private(Path(home)),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            _wait_for(lab, process, log)
            yield lab
        finally:
            _stop(process)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _command(lab: Lab, root: Path) -> list[str]:
    flags = [
        "--no-browser",
        "--allow-root",
        f"--ServerApp.root_dir={root}",
        "--LabApp.news_url=None",
        "--ip=127.0.0.1",
        f"--port={lab.port}",
        "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={lab.token}",
        "--LabApp.expose_app_in_browser=True",
    ]
    return [sys.executable, "-m", "jupyterlab", *flags]


def _private(home: Path) -> dict:
    """The environment: every folder of Jupyter's is in home, and quantlab is the one of this checkout."""
    for plugin, settings in SETTINGS.items():
        path = home / "settings/@jupyterlab" / f"{plugin}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(settings), encoding="utf-8")
    names = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "IPYTHONDIR": "ipython",
    }
    folders = {name: str(home / folder) for name, folder in names.items()}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    model = os.environ.get("QUANTLAB_BROWSER_MODEL")  # another than the tests beside these run on
    other = {"QUANTLAB_MODEL": model, "QUANTLAB_SMOLLM2": "0"} if model else {}  # nor SmolLM2: its stand-in is tried
    return os.environ | folders | {"PYTHONPATH": path} | other


def _wait_for(lab: Lab, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(OSError), urllib.request.urlopen(lab.address("api/status"), timeout=5):
            return
        time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text(encoding='utf-8')[-2000:]}")


def _stop(process: subprocess.Popen) -> None:
    """Asked to end, the server ends its kernels first; what its group still holds afterwards is killed."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(30)
    if os.name == "nt":
        process.kill()
    else:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@dataclass(frozen=True)
class Notebook:
    """An open notebook. thrown fills up with the exceptions that JavaScript did not catch."""

    page: Page
    thrown: list[str]

    def run_all(self, cell_timeout: float = 300) -> None:
        """Run every cell. Raises RuntimeError when one raises, is not reached, or takes too long."""
        self.page.evaluate(RUN_ALL)
        done, moved, worked = 0, time.monotonic(), time.monotonic()
        while not (progress := self.page.evaluate(PROGRESS))["complete"]:
            now = time.monotonic()
            moved = now if progress["done"] > done else moved
            worked = worked if progress["idle"] else now
            # Lab's command ends at an intended error too, but the kernel then goes on with the next cells.
            if now - moved > cell_timeout or now - max(moved, worked) > 10:
                break
            done = progress["done"]
            self.page.wait_for_timeout(200)
        if problems := [problem for cell in self.code_cells() for problem in _problems(cell)]:
            raise RuntimeError("; ".join(problems))
        self.page.evaluate(WATCH)

    def code_cells(self) -> list[dict]:
        return [cell for cell in self.page.evaluate(CONTENT)["cells"] if cell["cell_type"] == "code"]

    def explorers(self) -> Locator:
        """The boxes of sliders, picture and numbers in the page, from top to bottom."""
        picture = self.page.locator("img.widget-image")
        return self.page.locator(".jp-OutputArea-output .widget-vbox", has=picture)

    def idle(self) -> bool:
        return self.page.evaluate(IDLE)

    def errors(self) -> list[str]:
        """What went wrong since the cells ran: in JavaScript, and in Python's answers to sliders."""
        return self.thrown + self.page.evaluate("() => window.raised")


def _problems(cell: dict) -> list[str]:
    source = "".join(cell["source"])
    if not source.strip() or "raises-exception" in cell["metadata"].get("tags", []):
        return []
    found = [f"{out['ename']}: {out['evalue']}" for out in cell["outputs"] if out["output_type"] == "error"]
    found += ["no end reached"] if cell["execution_count"] is None else []
    return [f"{problem} (in the cell {source[:60]!r})" for problem in found]


@contextmanager
def notebook(browser: Browser, lab: Lab, path: str) -> Iterator[Notebook]:
    """The notebook at path (below Lab's folder), open with a kernel that has run nothing yet."""
    page, thrown = browser.new_page(viewport={"width": 1280, "height": 1000}), []
    page.on("pageerror", lambda error: thrown.append(str(error)))
    page.set_default_timeout(START * 1000)
    try:
        page.goto(lab.address(f"lab/tree/{path}") + "&reset", wait_until="domcontentloaded")
        page.wait_for_function(IDLE)
        yield Notebook(page, thrown)
        page.evaluate(SHUT_DOWN)
    finally:
        page.close()
