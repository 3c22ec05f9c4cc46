"""A person at the keyboard: JupyterLab on loopback in a temporary folder, and a real headless Chromium before it.

    def test_it(lab):
        notebook = lab.open("x = 1\nprint('ready')")
        notebook.run_all()
        assert notebook.output(0).inner_text().strip() == "ready"
        assert notebook.value("x") == 1

Server and browser live as long as the session, one of each in a worker that has tests of this folder
(`--dist loadfile` keeps a file's tests in one). Without Chromium the tests are skipped, unless
OVISNB_BROWSER_TESTS=1 says that they must run.
"""

from __future__ import annotations

import ast
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import psutil
import pytest
from jupyter_client import BlockingKernelClient

SECONDS = 180  # longest wait for anything on a busy machine
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules",
]
ARGUMENTS[-1] += "=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"  # whatever a page asks for, nothing leaves this machine
OVERRIDES = {
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none", "autoStartDefaultKernel": True},
}


def chromium() -> str:
    """Where Chromium is; skips the test, or fails it where it must run, when it is not installed."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        reason = "no Chromium on the path: apt-get install chromium"
        (pytest.fail if os.environ.get("OVISNB_BROWSER_TESTS") == "1" else pytest.skip)(reason)
    return found


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium (playwright's Browser)."""
    binary = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=binary, args=ARGUMENTS)
        yield started
        started.close()
        # Playwright would wait for its driver to see the end of a pipe, which a process forked meanwhile (a DataLoader's
        # worker that a failed run left to the garbage collector) keeps open: for ever.
        for child in psutil.Process().children():
            with suppress(psutil.Error):  # a child that ended, or that nobody has waited for, is none of this
                if Path(child.exe()).name == "node":  # its name is that of a thread
                    child.terminate()


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A JupyterLab server of its own: (address, token, notebook folder, runtime folder)."""
    chromium()  # without it nobody would look
    root = tmp_path_factory.mktemp("lab")
    folders = {name: root / name for name in ("notebooks", "config", "data", "runtime", "ipython", "settings")}
    for folder in folders.values():
        folder.mkdir()
    (folders["settings"] / "overrides.json").write_text(json.dumps(OVERRIDES))
    token = secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1"]
    command += ["--ServerApp.port=0", f"--ServerApp.root_dir={folders['notebooks']}", "--ServerApp.quit_button=False"]
    command += [f"--LabApp.app_settings_dir={folders['settings']}", "--LabApp.extension_manager=readonly"]
    environment = os.environ | {"JUPYTER_TOKEN": token, "JUPYTER_CONFIG_DIR": str(folders["config"])}
    environment |= {"JUPYTER_DATA_DIR": str(folders["data"]), "JUPYTER_RUNTIME_DIR": str(folders["runtime"])}
    environment |= {"IPYTHONDIR": str(folders["ipython"]), "HF_HUB_OFFLINE": "1", "JUPYTER_PREFER_ENV_PATH": "1"}
    with open(root / "log", "wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield _address(process, folders["runtime"], root / "log"), token, folders["notebooks"], folders["runtime"]
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # it shuts its kernels down
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _address(process: subprocess.Popen, runtime: Path, log: Path) -> str:
    """The server's address, once it answers."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until and process.poll() is None:
        for path in runtime.glob("jpserver-*.json"):
            try:
                address = f"http://127.0.0.1:{json.loads(path.read_text())['port']}"
                urllib.request.urlopen(f"{address}/api", timeout=SECONDS).close()
                return address
            except (OSError, ValueError, KeyError):
                pass
        time.sleep(0.05)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text(errors='replace')[-2000:]}")


class Lab:
    """The server seen by one browser window."""

    def __init__(self, browser, server):
        self.address, self.token, self.folder, self.runtime = server
        self.context = browser.new_context(viewport={"width": 1400, "height": 1000})
        self.context.set_default_timeout(SECONDS * 1000)
        self.count = 0

    def open(self, *cells: str, name: str = "") -> Notebook:
        """A notebook of these code cells (strings), or an existing one of the folder by its `name`, in a new tab."""
        if cells:
            self.count += 1
            name = name or f"test_{self.count}.ipynb"
            sources = [nbformat.v4.new_code_cell(cell) for cell in cells]
            kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
            metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
            nbformat.write(nbformat.v4.new_notebook(cells=sources, metadata=metadata), self.folder / name)
        return Notebook(self, name)

    def api(self, path: str, method: str = "GET"):
        """What the server's REST interface answers."""
        request = urllib.request.Request(f"{self.address}/api/{path}", method=method)
        request.add_header("Authorization", f"token {self.token}")
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            body = answer.read()
        return json.loads(body) if body else None


class Notebook:
    """A notebook in a tab. `page` is playwright's; `dialogs`, `errors` and `strangers` are what must stay empty:
    texts of alert boxes, of uncaught errors, and addresses asked for beyond the server."""

    def __init__(self, lab: Lab, name: str):
        self.lab, self.name = lab, name
        self.dialogs, self.errors, self.strangers = [], [], []
        self.page = page = lab.context.new_page()
        page.on("dialog", lambda dialog: (self.dialogs.append(dialog.message), dialog.dismiss()))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", self._note)
        # ipywidgets' manager asks a new kernel for its widgets. A cell that makes one before the answer is there
        # may show "Loading widget..." for ever.
        self.asked = False
        page.on("websocket", lambda socket: socket.on("framereceived", self._listen))
        page.goto(f"{lab.address}/doc/tree/{name}?reset&token={lab.token}")
        page.locator(".jp-NotebookPanel .jp-Cell").first.wait_for()
        self._client = None

    def _note(self, request) -> None:
        address = urlsplit(request.url)
        if address.scheme not in ("data", "blob") and not request.url.startswith(self.lab.address):
            self.strangers.append(request.url)

    def _listen(self, frame: str | bytes) -> None:
        self.asked = self.asked or (b"comm_info_reply" if isinstance(frame, bytes) else "comm_info_reply") in frame

    def wait_idle(self) -> None:
        self.page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').wait_for(state="attached")

    def run_all(self) -> None:
        """Run all cells and wait until the last one is done; a cell that raises fails the test with its traceback."""
        prompts = self.page.locator(".jp-CodeCell .jp-InputPrompt")
        until, again, mixed = time.monotonic() + SECONDS, 0.0, 0
        while re.search(r"\[\D\]", states := "".join(prompts.all_text_contents())):
            now = time.monotonic()
            # what waits is [*]: cells left at [ ] below one that ran mean that it raised
            mixed = mixed + 1 if "[ ]" in states and "[*]" not in states and re.search(r"\d", states) else 0
            if mixed > 10 or now > until:
                pytest.fail(f"the cells stopped at {states}\n{self._printed()}")
            if now > again and re.fullmatch(
                r"(\[ \]:)+", states
            ):  # a click is lost while the kernel is being connected
                self.wait_idle()
                now = time.monotonic()  # connecting may have taken long
                while not self.asked and time.monotonic() < now + 60:
                    self.page.wait_for_timeout(50)
                self.page.get_by_role("menuitem", name="Run", exact=True).click()
                self.page.get_by_role("menuitem", name=re.compile("^Run All Cells")).click()
                again = time.monotonic() + 10  # a click too many would run the cells twice
            self.page.wait_for_timeout(50)
        self.wait_idle()
        if re.search("Traceback|Error: ", printed := self._printed()):
            pytest.fail(printed)

    def _printed(self) -> str:
        """What the cells wrote to stderr, tracebacks among it."""
        written = self.page.locator('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.stderr"]')
        return "\n".join(written.all_inner_texts())

    def cell(self, index: int):
        """The code cell (playwright's Locator)."""
        return self.page.locator(".jp-Notebook .jp-CodeCell").nth(index)

    def output(self, index: int):
        """The output area of a code cell (playwright's Locator)."""
        return self.cell(index).locator(".jp-Cell-outputArea")

    def value(self, expression: str):
        """The value of a Python expression in the notebook's kernel, a literal."""
        if self._client is None:
            sessions = [one for one in self.lab.api("sessions") if one["path"] == self.name]
            self._client = BlockingKernelClient()
            self._client.load_connection_file(str(self.lab.runtime / f"kernel-{sessions[0]['kernel']['id']}.json"))
            # only the channel of answers: of what is broadcast, a client that has just connected may miss the end
            self._client.start_channels(iopub=False, stdin=False, hb=False, control=False)
        asked = {"value": f"repr(({expression}))"}
        reply = self._client.execute("", silent=True, user_expressions=asked, reply=True, timeout=SECONDS)
        value = reply["content"]["user_expressions"]["value"]
        if value["status"] != "ok":
            raise RuntimeError(f"{expression}: {value['ename']}: {value['evalue']}")
        return ast.literal_eval(ast.literal_eval(value["data"]["text/plain"]))

    def becomes(self, expression: str, expected) -> None:
        """Wait until a Python expression in the kernel has this value: what a widget sends takes a moment."""
        until = time.monotonic() + SECONDS
        while (value := self.value(expression)) != expected and time.monotonic() < until:
            time.sleep(0.02)
        assert value == expected

    def unharmed(self) -> None:
        """Assert that nothing of the data became a dialog, an error or a request."""
        assert (self.dialogs, self.errors, self.strangers) == ([], [], [])

    def close(self) -> None:
        """Close the tab and end the kernel."""
        if self._client is not None:
            self._client.stop_channels()
        self.page.close()
        for session in self.lab.api("sessions"):
            if session["path"] == self.name:
                self.lab.api(f"sessions/{session['id']}", method="DELETE")


@pytest.fixture(scope="session")
def lab(browser, server):
    """JupyterLab in Chromium; `lab.open(...)` opens a notebook."""
    window = Lab(browser, server)
    yield window
    window.context.close()
