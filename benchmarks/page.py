"""How fast the HTML dump of a long program is written, opens in a browser and draws.

    GRAPHOPT_BROWSER=chromium python benchmarks/page.py [--repeats 5] [--out FILE]

A chain of 40,000 calls in 100 layers of four modules. ``written_s``: seconds to write the page; ``open_ms``:
milliseconds from the navigation until the page has been drawn; ``all_ms``: laying all values out once every
layer is open; ``paint_ms``: the longest frame of 20 over all of it, from far to near. Headless Chromium
without a GPU.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from harness import RESULTS, environment, parser, say

from graphopt.dump.page import Sheet, page_text
from tests.browser import Browser, browser_path
from tests.pages import long_program, opened

LAYERS, CALLS = 100, 400
_PAINT = """
[0.004, 0.05, 0.3, 1].flatMap((s) => [0, 1, 2, 3, 4].map((k) => {
  const v = graphopt.views[0]; v.scale = s; v.ty = -k * v.h * s / 5; v.paint(); return v.paintMs;}))
"""


def main() -> None:
    import json

    from graphopt.atomic import write_atomically

    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=5)
    chosen = options.parse_args()
    path = browser_path()
    if path is None:
        raise SystemExit("no Chromium on the path, nor in GRAPHOPT_BROWSER")
    program = long_program(LAYERS, CALLS)
    begun = time.perf_counter()
    text = page_text([Sheet(program)])
    written = time.perf_counter() - begun
    rows = []
    with tempfile.TemporaryDirectory() as folder, Browser(path, Path(folder) / "profile") as browser:
        for _ in range(chosen.repeats):
            ready = opened(browser, Path(folder) / "page.html", text)
            browser.run("byId('open').onclick(); 0")
            frames = browser.run(_PAINT)
            rows.append(
                {
                    "open_ms": round(ready),
                    "all_ms": round(browser.run("graphopt.views[0].layoutMs")),
                    "paint_ms": round(max(frames), 1),
                }
            )
            say(str(rows[-1]))
        name = browser.run("navigator.userAgent")
    about = environment()
    summary = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    record = {
        "figure": "page",
        **about,
        "command": f"GRAPHOPT_BROWSER=chromium {about['command']}",
        "browser": name,
        "values": len(program.graph.nodes),
        "bytes": len(text),
        "written_s": round(written, 2),
        "summary": summary,
        "rows": rows,
    }
    write_atomically(chosen.out or RESULTS / "page.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
