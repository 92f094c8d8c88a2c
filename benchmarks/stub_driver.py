"""Triton's real compiler and launcher without a GPU: over a libcuda on which launches cost nothing and do nothing."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parent / "stub_libcuda.c"
# Where a process looks for the stub, set before it starts: the loader reads its paths once.
_FOLDER = "RENYI_KD_STUB_LIBCUDA"


def command_over_stub(*command: str) -> int:
    """Run a command of Python's in a process that finds the stub, and return its exit status.

    Raises:
        OSError: there is no gcc to build the stub with.

    """
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "libcuda.so.1")
        subprocess.run(["gcc", "-shared", "-fPIC", "-w", "-O1", "-o", str(library), str(SOURCE)], check=True)
        Path(folder, "libcuda.so").symlink_to(library.name)
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {_FOLDER: folder, "TRITON_LIBCUDA_PATH": folder}
        environment["LD_LIBRARY_PATH"] = os.pathsep.join([folder, os.environ.get("LD_LIBRARY_PATH", "")])
        return subprocess.run([sys.executable, *command], env=environment, check=False).returncode


def is_over_stub() -> bool:
    """Return whether this process finds the stub."""
    return _FOLDER in os.environ


def use_stub(capability: int = 90) -> None:
    """Let Triton launch over the stub from now on, as on a GPU of this capability, whatever device tensors are on.

    The package then takes its kernels for tensors on the CPU.
    """
    ctypes.CDLL(str(Path(os.environ[_FOLDER], "libcuda.so.1")), mode=ctypes.RTLD_GLOBAL)
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    from renyi_kd.ops import dispatch

    class StubDriver(nvidia.CudaDriver):
        """Asks PyTorch for nothing: it has no GPU."""

        def __init__(self) -> None:
            self.utils = nvidia.CudaUtils()
            self.launcher_cls = nvidia.CudaLauncher
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0
            self.set_current_device = lambda device: None
            self.get_device_capability = lambda device=0: divmod(capability, 10)

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", capability, 32)

    driver.set_active(StubDriver())
    # No mock: a call of one takes several microseconds, for a question that on a GPU nobody asks.
    dispatch._interprets = lambda: True
