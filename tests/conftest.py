import gc
import os

import pytest
import torch
from interpreter import speed_up_interpreter
from torch.distributed.elastic.utils.distributed import get_free_port

# All tests are imported before one runs. To look for garbage among what they import took as long.
gc.disable()
# Without a GPU, Triton's interpreter runs the kernels. Set this before anything imports Triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
speed_up_interpreter()
# Processes that share the cores would wait for each other's threads.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, found none"))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture
def free_port() -> int:
    return get_free_port()
