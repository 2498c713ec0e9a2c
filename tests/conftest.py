"""The environment of every test; whatever starts a process hands it on."""

import os
import pathlib
import subprocess
import sys
import tempfile

import pytest

# Before jax starts, which reads all of these once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # PyTorch, beside it, is on a CPU too
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Outlives the tests: compiling is most of their time.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(pathlib.Path(tempfile.gettempdir()) / f"aim_jax-{os.getuid()}" / "jax"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


@pytest.fixture(scope="session")
def command():
    """The finished process of a command: command("report", argument, ...)."""

    def call(name, *arguments):
        return subprocess.run(
            [sys.executable, "-m", f"aim_jax.{name}", *map(str, arguments)],
            cwd=pathlib.Path(__file__).parents[1],
            capture_output=True,
            text=True,
        )

    return call
