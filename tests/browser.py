"""A headless browser for tests of pages, driven over pipes by the DevTools protocol; no package is needed."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["Browser", "browser_path"]

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "chromium-headless-shell")


def browser_path() -> str | None:
    """Where a Chromium is: ``$GRAPHOPT_BROWSER``, or one on the path."""
    named = os.environ.get("GRAPHOPT_BROWSER")
    return named or next((found for name in _NAMES if (found := shutil.which(name))), None)


class Browser:
    """One page in a headless Chromium of its own."""

    def __init__(self, path: str, profile: Path, size: tuple[int, int] = (1400, 900)) -> None:
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()

        def hand_over() -> None:
            os.dup2(to_read, 3)
            os.dup2(to_write, 4)

        # Numbers 3 and 4 are what the browser reads and writes; both must survive being duplicated.
        to_read, to_write = _above(to_read), _above(to_write)
        flags = [
            "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run",
            "--single-process", "--no-zygote", f"--user-data-dir={profile}",
            f"--window-size={size[0]},{size[1]}",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            [path, *flags, "about:blank"],
            pass_fds=(3, 4, to_read, to_write),
            preexec_fn=hand_over,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._number, self._rest, self._session = 0, b"", ""
        targets = self._send("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self._send("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        width, height = size
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._send("Emulation.setDeviceMetricsOverride", **screen)

    def open(self, path: Path) -> None:
        """Load a file and wait until it has loaded."""
        self._send("Page.navigate", url=path.resolve().as_uri())
        while self.run("location.href + ' ' + document.readyState") != f"{path.resolve().as_uri()} complete":
            pass

    def run(self, script: str) -> Any:
        """The value of an expression in the page, that of a promise once it is settled."""
        found = self._send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(str(found["exceptionDetails"])[:2000])
        return found["result"].get("value")

    def click(self, x: float, y: float) -> None:
        """A click of the left button."""
        for kind in ("mousePressed", "mouseReleased"):
            self._send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self, path: Path) -> None:
        """Write what the page looks like as PNG."""
        path.write_bytes(base64.b64decode(self._send("Page.captureScreenshot", format="png")["data"]))

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)

    def _send(self, method: str, **params: Any) -> Any:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _read(self) -> Any:
        while b"\0" not in self._rest:
            piece = os.read(self._from, 1 << 20)
            if not piece:
                raise RuntimeError("the browser ended")
            self._rest += piece
        text, _, self._rest = self._rest.partition(b"\0")
        return json.loads(text)


def _above(number: int) -> int:
    """A duplicate of a file descriptor that is none of the first few."""
    import fcntl

    made = fcntl.fcntl(number, fcntl.F_DUPFD, 10)
    os.close(number)
    return made
