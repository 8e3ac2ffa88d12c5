"""A headless Chromium, driven over the DevTools protocol with a real pointer."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, ClientWebSocketResponse

PATIENCE = 60.0
"""seconds until a test gives up on the browser"""


class Browser:
    """One page of a running Chromium."""

    def __init__(self, port: int) -> None:
        self._loop = asyncio.new_event_loop()
        self._calls = 0
        self.requests: list[str] = []
        """addresses that the page asked for since it was opened"""
        self.errors: list[str] = []
        """exceptions of its scripts, and what its security policy refused"""
        self._loop.run_until_complete(self._connect(port))
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    async def _connect(self, port: int) -> None:
        self._session = ClientSession()
        async with self._session.get(f"http://127.0.0.1:{port}/json") as reply:
            page = next(target for target in await reply.json() if target["type"] == "page")
        self._socket: ClientWebSocketResponse = await self._session.ws_connect(
            page["webSocketDebuggerUrl"], max_msg_size=0
        )

    def call(self, method: str, **values: Any) -> dict[str, Any]:
        """The result of a method of the protocol."""
        return self._loop.run_until_complete(asyncio.wait_for(self._call(method, values), PATIENCE))

    async def _call(self, method: str, values: dict[str, Any]) -> dict[str, Any]:
        self._calls += 1
        await self._socket.send_json({"id": self._calls, "method": method, "params": values})
        while True:
            reply = json.loads((await self._socket.receive()).data)
            if reply.get("method") == "Network.requestWillBeSent":
                self.requests.append(reply["params"]["request"]["url"])
            elif reply.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.errors.append(json.dumps(reply["params"]))
            if reply.get("id") == self._calls:
                assert "error" not in reply, reply
                return reply["result"]

    def open(self, page: Path, width: int = 1200, dark: bool = False, media: str = "", scripts: bool = True) -> None:
        """Load a file in a window of that width and colour scheme; media: "print" for how it prints."""
        self.requests.clear()
        self.errors.clear()
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.call("Page.navigate", url=page.as_uri())
        self.wait_for(f"document.readyState === 'complete' && location.href === {json.dumps(page.as_uri())}")

    def evaluate(self, script: str) -> Any:
        """The JSON value of an expression in the page; promises are awaited."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, script: str) -> Any:
        """The value of an expression as soon as it is true."""
        until = time.monotonic() + PATIENCE
        while not (value := self.evaluate(script)):
            assert time.monotonic() < until, f"still not true: {script}"
            time.sleep(0.05)
        return value

    def point_at(self, element: str) -> str:
        """Move the pointer onto the middle of an element, given as a JavaScript expression; the hover text."""
        self.evaluate(f"({element}).scrollIntoView({{ block: 'center' }})")
        self.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 300)))")
        middle = f"(() => {{ const r = ({element}).getBoundingClientRect();"
        x, y = self.evaluate(f"{middle} return [r.x + r.width / 2, r.y + r.height / 2]; }})()")
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
        self.wait_for("document.querySelector('#tip').hidden")
        for shift in (1, 0):
            self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x + shift, y=y)
        return str(
            self.wait_for("!document.querySelector('#tip').hidden && document.querySelector('#tip').textContent")
        )

    def close(self) -> None:
        """Close the connection; the process is ended by who started it."""
        self._loop.run_until_complete(self._session.close())
        self._loop.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A Chromium for the tests of a module."""
    if shutil.which("chromium") is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    profile = tmp_path_factory.mktemp("profile")
    quiet = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", *quiet, "--remote-debugging-port=0"]
    process = subprocess.Popen(
        ["chromium", *flags, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        port = profile / "DevToolsActivePort"
        until = time.monotonic() + PATIENCE
        while not (port.exists() and len(port.read_text().split()) == 2):
            assert process.poll() is None and time.monotonic() < until, "chromium does not answer"
            time.sleep(0.1)
        page = Browser(int(port.read_text().split()[0]))
        yield page
        page.close()
    finally:
        process.terminate()
        process.wait()
