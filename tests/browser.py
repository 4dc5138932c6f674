# SPDX-License-Identifier: Apache-2.0
"""A headless Chromium for pages that are one file: `with opened(page) as browser` gives selenium's driver.

It comes from the system (Debian: chromium and chromium-driver), found on PATH; nothing is downloaded. Where there is
none, the test is skipped and says so.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def opened(page: Path, width: int = 1200, height: int = 900, dark: bool = False) -> Iterator[Any]:
    """The page in a window of that size; no network, and every message of the console is kept."""
    webdriver = pytest.importorskip("selenium.webdriver")
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("no chromium and chromedriver on PATH (Debian: apt install chromium chromium-driver)")
    os.environ["SE_OFFLINE"] = "true"  # selenium looks for nothing itself
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    arguments += [f"--window-size={width},{height}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    for argument in [*arguments, *(["--force-dark-mode"] if dark else [])]:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        if dark:
            media = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
            chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        if width < 500:  # narrower than a window may be
            size = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": True}
            chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        chrome.get(page.as_uri())
        yield chrome
    finally:
        chrome.quit()


def requests(chrome: Any) -> list[str]:
    """What the page asked for, other than itself."""
    import json

    events = (json.loads(entry["message"])["message"] for entry in chrome.get_log("performance"))
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return [url for url in asked if not url.startswith(("data:", "file:"))]
