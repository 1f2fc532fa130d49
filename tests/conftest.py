"""Golden files: ``golden("name.txt", text)`` compares, ``pytest --accept`` rewrites."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.ranks import Pair

# The quick suite says the same of the same sources; `make test-all` draws anew each time.
# Tests judge no times: a busy machine would fail them.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None)
settings.load_profile("repeatable")

GOLDEN = Path(__file__).parent / "golden"
LONG = frozenset((Path(__file__).parent / "slow.txt").read_text(encoding="utf-8").split("\n")) - {""}
"""Tests that take long and say what a quicker one beside them says of something else: the long suite runs
them. Measured with ``--durations``."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accept", action="store_true", help="rewrite golden files with what the tests produce")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid in LONG:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--accept"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"{path} does not exist; pytest --accept writes it"
        assert text == path.read_text(encoding="utf-8"), "pytest --accept takes the new text over"

    return compare


@pytest.fixture(autouse=True, scope="session")
def _nothing_kept() -> Iterator[None]:
    """Tests plan and compile anew, whatever earlier runs kept; those of warm starts switch it on again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRAPHOPT_CACHE", "0")
        yield


@pytest.fixture(autouse=True, scope="session")
def _modules_are_not_searched() -> None:
    """Collections, which every measurement makes, pass over what is imported and never goes."""
    importlib.import_module("torch._inductor.compile_fx")
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _compiled_code_goes() -> Iterator[None]:
    """Dynamo looks through all that it compiled of torch's own modules before it runs one again."""
    yield
    torch._dynamo.reset()
    gc.collect()


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two processes that train together, kept from test to test."""
    made = Pair(tmp_path_factory.mktemp("ranks"))
    yield made
    made.close()
