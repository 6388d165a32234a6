"""What the tests on a GPU share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _tf32() -> Iterator[None]:
    """As 16-bit training sets it; without it the compiler warns, and warnings are errors."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
