"""A headless Chromium that tests can drive with real input: the DevTools protocol over two pipes, nothing to install.

Messages are JSON, ended by a zero byte: https://chromedevtools.github.io/devtools-protocol/
"""

import base64
import io
import json
import os
import pathlib
import select
import shutil
import subprocess
import sys
import tempfile
import time

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--remote-debugging-pipe"]


class Page:
    """One page of one browser; `with Page(url) as page`."""

    def __init__(self, url, width=1280, height=800, touch=False):
        self.profile = tempfile.mkdtemp()
        commands, self.to_browser = os.pipe()      # it reads descriptor 3 and writes descriptor 4
        self.from_browser, answers = os.pipe()
        redirect = f'exec "$@" 3<&{commands} 4>&{answers}'
        self.process = subprocess.Popen(
            ["bash", "-c", redirect, "browser", CHROMIUM, *FLAGS, f"--user-data-dir={self.profile}", "about:blank"],
            pass_fds=(commands, answers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(commands)
        os.close(answers)
        self.count, self.session, self.events, self.rest = 0, None, [], b""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime"):
            self.call(f"{domain}.enable")
        self.resize(width, height, touch)
        self.open(url)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.terminate()
        self.process.wait(timeout=20)
        os.close(self.to_browser)
        os.close(self.from_browser)
        shutil.rmtree(self.profile, ignore_errors=True)

    def message(self):
        """The next message of the browser; other than answers are kept in self.events."""
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.from_browser], [], [], 120)
            new = os.read(self.from_browser, 1 << 16) if ready else b""
            assert new, "the browser went away" if ready else "the browser has been silent for two minutes"
            self.rest += new
        one, self.rest = self.rest.split(b"\0", 1)
        found = json.loads(one)
        if "id" not in found:
            self.events.append(found)
        return found

    def call(self, method, **params):
        """Send a command, wait for its answer."""
        self.count += 1
        sent = {"id": self.count, "method": method, "params": params} | ({"sessionId": self.session} if self.session else {})
        os.write(self.to_browser, json.dumps(sent).encode() + b"\0")
        while (found := self.message()).get("id") != self.count:
            pass
        assert "error" not in found, f"{method}: {found['error']}"
        return found["result"]

    def js(self, expression):
        """The value of an expression of JavaScript, or of the promise it makes."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def open(self, url):
        self.call("Page.navigate", url="about:blank")              # a new hash alone would not load it again
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def until(self, condition, seconds=120):
        """Wait for a condition of the page."""
        end = time.monotonic() + seconds
        while not self.js(condition):
            assert time.monotonic() < end, f"still not true: {condition}"
            time.sleep(0.02)

    def resize(self, width, height, touch=False):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch)
        self.call("Emulation.setTouchEmulationEnabled", enabled=touch)

    def mouse(self, kind, x, y, clicks=1):
        """kind: Pressed, Moved or Released, at a place in CSS pixels."""
        self.call("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, clickCount=clicks, button="left", buttons=1)

    def drag(self, start, end, touch=False):
        """Press at start, go to end in five moves, let go: with the mouse or with a finger."""
        path = [[a + (b - a) * k / 5 for a, b in zip(start, end)] for k in range(6)]
        for kind, (x, y) in zip(["Pressed", *["Moved"] * 5, "Released"], [*path, path[-1]]):
            if not touch:
                self.mouse(kind, x, y)
                continue
            kind = {"Pressed": "touchStart", "Moved": "touchMove", "Released": "touchEnd"}[kind]
            points = [] if kind == "touchEnd" else [{"x": x, "y": y}]
            self.call("Input.dispatchTouchEvent", type=kind, touchPoints=points)

    def click(self, selector):
        """With the mouse, at the middle of an element."""
        x, y = self.js(f"""(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{block: "nearest"}});
            const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; }})()""")
        for kind in ("Pressed", "Released"):
            self.mouse(kind, x, y)

    def key(self, key, text=None):
        """Press and release a key by its name: "a", " ", "ArrowLeft"."""
        text = key if text is None and len(key) == 1 else text
        down = {"type": "keyDown", "text": text} if text else {"type": "rawKeyDown"}
        self.call("Input.dispatchKeyEvent", key=key, **down)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def screenshot(self):
        """The page as bytes of a PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def errors(self):
        """What the page threw and could not catch, so far."""
        return [e["params"]["exceptionDetails"] for e in self.events if e["method"] == "Runtime.exceptionThrown"]


def picture(path):
    """docs/explorer.png: the page after 14 steps from a blob, in 255 colours."""
    from PIL import Image

    url = (pathlib.Path(__file__).parents[1] / "explorer" / "index.html").as_uri() + "#n=200&sigma=0.3"
    with Page(url) as page:
        page.until("seen !== null")
        page.js("for (let k = 0; k < 14; k++) once(); paint(); $('speed').textContent = ''")
        image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        image.quantize(255, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    picture(sys.argv[1])
