"""A page in headless Chromium, driven by the DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)"
)
START_SECONDS = 120


class Page:
    """An open page: its errors, what its scripts return, keys, clicks, touches, screenshots."""

    def __init__(self, loop: asyncio.AbstractEventLoop, socket: Any) -> None:
        self.loop, self.socket, self.number = loop, socket, 0
        self.errors: list[str] = []
        self.requested: list[str] = []

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer of the DevTools protocol; events that come before it are kept."""
        return self.loop.run_until_complete(self._ask(method, parameters))

    async def _ask(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        self.number += 1
        await self.socket.send_json({"id": self.number, "method": method, "params": parameters})
        while True:
            message = await asyncio.wait_for(self.socket.receive_json(), START_SECONDS)
            event, about = message.get("method"), message.get("params", {})
            if event == "Runtime.exceptionThrown":
                self.errors.append(str(about["exceptionDetails"]))
            elif event == "Log.entryAdded" and about["entry"]["level"] == "error":
                self.errors.append(about["entry"]["text"])
            elif event == "Network.requestWillBeSent":
                self.requested.append(about["request"]["url"])
            elif message.get("id") == self.number:
                assert "error" not in message, message["error"]
                return dict(message["result"])

    def open(self, path: Path) -> None:
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        self.ask("Page.navigate", url=path.as_uri())
        deadline = time.monotonic() + START_SECONDS
        while self.value("document.readyState") != "complete":
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def value(self, expression: str) -> Any:
        """What JavaScript's `expression` is worth."""
        result = self.ask("Runtime.evaluate", expression=expression, returnByValue=True,
                          awaitPromise=True)  # fmt: skip
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def size(self, width: int, height: int, dark: bool = False) -> None:
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height,
                 deviceScaleFactor=1, mobile=width < 600)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])

    def place(self, selector: str, x: float, y: float) -> dict[str, float]:
        """Coordinates of the point at shares (x, y) of an element, scrolled into view."""
        # Two frames later the layout and what listens to scrolling have settled.
        box = self.value(
            f"(async () => {{ const e = document.querySelector({selector!r});"
            "e.scrollIntoView({block: 'center'});"
            "for (let i = 0; i < 2; i++) await new Promise(requestAnimationFrame);"
            "const b = e.getBoundingClientRect();"
            "return [b.left, b.top, b.width, b.height]; })()"
        )
        return {"x": box[0] + x * box[2], "y": box[1] + y * box[3]}

    def click(self, selector: str, x: float = 0.5, y: float = 0.5) -> None:
        at = self.place(selector, x, y)
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)

    def touch(self, selector: str, x: float = 0.5, y: float = 0.5) -> None:
        self.ask("Emulation.setTouchEmulationEnabled", enabled=True)
        at = self.place(selector, x, y)
        self.ask("Input.dispatchTouchEvent", type="touchStart", touchPoints=[at])
        self.ask("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def key(self, name: str) -> None:
        text = {"text": name} if len(name) == 1 else {}
        self.ask("Input.dispatchKeyEvent", type="keyDown", key=name, **text)
        self.ask("Input.dispatchKeyEvent", type="keyUp", key=name)

    def screenshot(self) -> bytes:
        return base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"])


@contextmanager
def opened(path: Path, folder: Path) -> Iterator[Page]:
    """The page of the HTML file `path`; `folder` holds the browser's profile."""
    import aiohttp

    assert CHROMIUM is not None
    process = subprocess.Popen(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
         "--disable-background-networking", "--remote-debugging-port=0",
         "--remote-allow-origins=*", f"--user-data-dir={folder}", "about:blank"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    loop = asyncio.new_event_loop()
    try:
        file, deadline = folder / "DevToolsActivePort", time.monotonic() + START_SECONDS
        while not (file.exists() and file.read_text().count("\n")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        port = file.read_text().split()[0]

        async def connect() -> tuple[Any, Any]:
            session = aiohttp.ClientSession()
            while True:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                    pages = [p for p in await answer.json() if p["type"] == "page"]
                if pages:
                    url = pages[0]["webSocketDebuggerUrl"]
                    return session, await session.ws_connect(url, max_msg_size=0)
                await asyncio.sleep(0.05)

        session, socket = loop.run_until_complete(asyncio.wait_for(connect(), START_SECONDS))
        page = Page(loop, socket)
        try:
            page.open(path)
            yield page
        finally:
            loop.run_until_complete(socket.close())
            loop.run_until_complete(session.close())
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        if process.poll() is None:
            process.kill()
        loop.close()
