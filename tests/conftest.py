"""What several files of tests share."""

import os

import labs
import pytest


@pytest.fixture(scope="module")
def browser():
    """Chromium; without one the tests that need it are skipped, or fail where QUANTLAB_REQUIRE_BROWSER=1."""
    if labs.find_chromium() is None:
        stop = pytest.fail if os.environ.get("QUANTLAB_REQUIRE_BROWSER") == "1" else pytest.skip
        stop("no Chromium on this machine (CHROMIUM=<path> names one that is not found)")
    with labs.chromium() as browser:
        yield browser
