"""What every test shares: settings of the process, seeds, and the device a test runs on.

Markers (declared in pyproject.toml): `gpu` for tests that need a CUDA GPU, skipped with a reason
elsewhere; `slow` for tests of more than 30 seconds on one core.
"""

import os
import random
import sys
import tempfile
from pathlib import Path

# Before torch is imported. Tests neither reach the network nor fight over cores.
_threads_are_ours = "OMP_NUM_THREADS" not in os.environ
os.environ.setdefault("OMP_NUM_THREADS", str(min(4, os.cpu_count() or 1)))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Tests run some of their modules as programs; those import python_tests and bench, too.
_root = str(Path(__file__).resolve().parents[1])
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_root, os.environ.get("PYTHONPATH")]))
if _root not in sys.path:
    sys.path.insert(0, _root)

# What the user tuned on this machine must not decide what is tested.
_cache = tempfile.TemporaryDirectory(prefix="sparsekern-cache-")
os.environ["SPARSEKERN_CACHE"] = _cache.name

import numpy  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

NO_GPU = "" if torch.cuda.is_available() else "no CUDA GPU that torch can use"

settings.register_profile(
    "sparsekern",
    deadline=None,  # the first call of a torch op can take a second
    derandomize=True,
    max_examples=50,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("sparsekern")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """Processes of `pytest -n auto`: one per core, but at most 8, since each loads torch and
    Transformers. 0, which means this process alone, where there is a GPU: tests measure on it.
    """
    if not NO_GPU:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(8, cores or 1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes():
    """`pytest -n` has a process per core (make test): one thread in each, whose environment is this
    one. Threads that wait for others by spinning make two processes ten times slower."""
    if _threads_are_ours:
        os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items):
    """Skips tests marked `gpu` where there is no GPU, with the reason in the summary."""
    if not NO_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """torch.device of the test: it runs once on the CPU and once, marked `gpu`, on the GPU."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seeds():
    """The same random numbers in every test, whichever others ran before it."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def registries():
    """What a test registers (a backend, a layout, an element type, a pruner) is gone after it."""
    from sparsekern.backends import registry
    from sparsekern.formats import dtypes, layouts

    methods = sys.modules["sparsekern.prune.methods"]  # not the function of that name

    tables = [registry._BACKENDS, dtypes._TABLE, layouts._LAYOUTS, methods._METHODS]
    before = [dict(table) for table in tables]
    preference = {device: list(names) for device, names in registry._PREFERENCE.items()}
    yield
    if [list(table) for table in tables] == [list(table) for table in before]:
        return
    for table, was in zip(tables, before, strict=True):
        table.clear()
        table.update(was)
    registry._PREFERENCE.clear()
    registry._PREFERENCE.update(preference)
    registry.changed()


@pytest.fixture(autouse=True)
def _compiled_anew():
    """torch.compile keeps little of a code object, and its own wrapper is one for all tests."""
    yield
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()
