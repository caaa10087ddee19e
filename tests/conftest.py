"""Fixtures that every test shares."""

import sys
from collections.abc import Iterator

import pytest
import torch

pytest.register_assert_rewrite("ops.packed_products", "fixed_linears")


def pytest_configure() -> None:
    """One thread: the tensors are small, and where cores are shared OpenMP's barriers cost ten times what they give."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip ``gpu`` tests on a machine without one."""
    if torch.version.cuda is None or torch.cuda.device_count() == 0:
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Run the test once per kind of device."""
    return request.param


@pytest.fixture(autouse=True)
def isolation() -> Iterator[None]:
    """Each test starts from the same seed and an empty compiler, and leaves torch's global settings as they were."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
    yield
    torch.set_default_dtype(dtype)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
