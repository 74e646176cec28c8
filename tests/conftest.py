"""What holds for every test: GPU and Triton tests are skipped, with the reason, where they cannot run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Which backend is fastest depends on the machine; tests that look at the choice must not. Compiled kernels are kept, away
# from the user's own, so that only the first run compiles.
os.environ["MMEFF_CALIBRATE"] = "0"
os.environ["MMEFF_CACHE"] = str(Path(__file__).parent.parent / ".pytest_cache" / "mmeff")

# A console that is made while COLUMNS is set keeps that width; tests set their own.
os.environ.pop("COLUMNS", None)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    triton = [item for item in items if item.get_closest_marker("interpreter")]
    if not gpu and not triton:
        return
    import torch

    on_gpu = torch.cuda.is_available() and not INTERPRETED
    if not on_gpu:
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False"))
    if not on_gpu and not INTERPRETED:
        for item in triton:
            item.add_marker(
                pytest.mark.skip(reason="runs in a process of its own: TRITON_INTERPRET=1 pytest -m interpreter")
            )


@pytest.fixture
def triton_device() -> str:
    """Where a test of a Triton kernel runs: on the GPU if there is one, else in Triton's interpreter."""
    import torch

    return "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
