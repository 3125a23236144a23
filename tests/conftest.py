"""One process-wide set-up for every test: eight CPU devices, strict array rules, a compilation cache.

It runs before any test module is imported, hence before any jax backend exists.
"""

import os
import pathlib
import sys

REPO_ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO_ROOT))

# Which imports no jax: that reads the environment.
from tests.launcher import QUICK_COMPILES  # noqa: E402

# What XLA_FLAGS says already stands behind these, and wins.
_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    # Two busy cores can keep a CPU collective waiting for longer than its default 40 s.
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    QUICK_COMPILES,
)
os.environ["XLA_FLAGS"] = " ".join([*_FLAGS, os.environ.get("XLA_FLAGS", "")]).strip()
os.environ["JAX_PLATFORMS"] = "cpu"
# XLA's CPU collectives block threads of a pool as large as the number of devices; with no more threads than that,
# two collectives in flight can wait for each other for ever. See axlearn.common.launch.
os.environ.setdefault("NPROC", "64")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("AXLEARN_CACHE_DIR", str(REPO_ROOT / ".cache"))

# Array shapes and types in signatures of these modules are checked at every call, in tests only.
SHAPE_CHECKED_MODULES = (
    "axlearn.common.attention",
    "axlearn.common.attention_bias",
    "axlearn.common.embedding",
    "axlearn.common.kv_cache",
    "axlearn.common.layers",
    "axlearn.common.loss",
    "axlearn.common.logit_modifiers",
)

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook(SHAPE_CHECKED_MODULES, "beartype.beartype")

import jax  # noqa: E402
import pytest  # noqa: E402

from tests.compiling import compiling_anew  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_threefry_partitionable", True)
jax.config.update("jax_compilation_cache_dir", os.path.join(os.environ["AXLEARN_CACHE_DIR"], "jax-tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

SHARED = REPO_ROOT.parent / "shared"
# Equal to the reference's dumps of the same names, also where those are not at hand.
C4_GOLDENS = REPO_ROOT / "tests" / "golden" / "axlearn.experiments.text.gpt.c4_trainer"


def pytest_addoption(parser):
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="Write the golden files under tests/golden from what the code produces now.",
    )


def pytest_collection_modifyitems(items):
    """Puts the folders of long files first: a worker that begins one when the other is done would leave it waiting."""
    long_folders = [REPO_ROOT / "tests" / name for name in ("parity", "faults", "hosts", "docs")]
    items.sort(key=lambda item: not any(item.path.is_relative_to(folder) for folder in long_folders))


@pytest.fixture(scope="session")
def shared_dir() -> pathlib.Path | None:
    """The reference material beside the checkout, or None where it is not there."""
    return SHARED if SHARED.is_dir() else None


@pytest.fixture(scope="session")
def reference_dump() -> list[str]:
    """The lines of the reference's fuji-test-v1.

    They are read from our own golden file, whose sum `c4_trainer_test.py` ties to the reference's text.
    """
    path = C4_GOLDENS / "fuji-test-v1.txt"
    return path.read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module", name="compiling_anew")
def _compiling_anew():
    """See `tests.compiling.compiling_anew`."""
    with compiling_anew():
        yield


@pytest.fixture
def golden(request):
    """Compares a text with tests/golden/NAME, or writes it there under --update-golden."""

    def check(name: str, text: str) -> None:
        path = REPO_ROOT / "tests" / "golden" / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        assert path.is_file(), f"{path} is missing; run pytest --update-golden and read the result."
        assert text == path.read_text(encoding="utf-8"), (
            f"{name} differs from what the code produces; read the difference, then --update-golden."
        )

    return check
