"""Shared by all tests: folders of their own, and runtimes that EDGEPRUNE_REQUIRE forbids to skip."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from edgeprune.backends import find_backend


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small tensors on shared cores: threads of torch would wait for each other."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Neither the user's tables and devices.yaml nor shipped tables reach a test, and none leaves anything there."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CACHE_DIR", "CONFIG_DIR", "SHIPPED_TABLES"):
            patch.setenv(f"EDGEPRUNE_{name}", str(tmp_path_factory.mktemp(name.lower())))
        patch.delenv("EDGEPRUNE_DEBUG", raising=False)
        yield


@pytest.fixture(scope="session")
def require() -> Callable[[str], None]:
    """`require("openvino")` skips where the runtime is missing, and fails when EDGEPRUNE_REQUIRE names it."""

    def check(backend: str) -> None:
        fix = find_backend(backend).available()
        if fix is None:
            return
        if backend in os.environ.get("EDGEPRUNE_REQUIRE", "").split(","):
            pytest.fail(f"EDGEPRUNE_REQUIRE names {backend}, but: {fix}")
        pytest.skip(fix)

    return check
