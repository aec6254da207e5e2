"""The browser that page tests and diagrams use: one that is installed on the machine, never one downloaded."""

from __future__ import annotations

import os
import shutil

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATHS = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def find_browser() -> str | None:
    """The environment's CHROMIUM, else the first known name or place; None without any (`make browser`)."""
    return next(filter(None, map(shutil.which, filter(None, [os.environ.get("CHROMIUM"), *NAMES, *PATHS]))), None)


def launch(playwright):
    """A headless browser of an open playwright session."""
    if not (path := find_browser()):
        raise FileNotFoundError("no Chromium or Chrome here: run `make browser`")
    return playwright.chromium.launch(executable_path=path, headless=True, args=FLAGS)
