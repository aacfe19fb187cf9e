"""Takes the pictures of README and docs: `python infra/docs/picture.py PAGE.html docs/report.png [TOP BOTTOM]`.

TOP and BOTTOM are pixels of the page, 900 wide; by default the first 1,100. The new items of a demo lie between
660 and 1070. Needs Debian's chromium and the dev extra's playwright.
"""

import io
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

_WIDTH, _COLOURS = 900, 64


def take(page: Path, picture: Path, top: int, bottom: int) -> None:
    """Writes a strip of a page as a small PNG."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": _WIDTH, "height": bottom})
        tab.goto(page.absolute().as_uri())
        shot = tab.screenshot(clip={"x": 0, "y": top, "width": _WIDTH, "height": bottom - top})
        browser.close()
    colours = Image.open(io.BytesIO(shot)).convert("RGB").quantize(_COLOURS)
    colours.save(picture, optimize=True)


if __name__ == "__main__":
    top, bottom = (int(sys.argv[3]), int(sys.argv[4])) if len(sys.argv) > 3 else (0, 1_100)
    take(Path(sys.argv[1]), Path(sys.argv[2]), top, bottom)
