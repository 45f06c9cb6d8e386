"""Builds csrc into the wheel ahead of time: `ROSE_BUILD_EXT=1 pip install --no-build-isolation .`. Otherwise nothing is built."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeBuildHook(BuildHookInterface):
    """Puts the library beside `rose_kernels/native.py` under the name that it looks for, and marks the wheel as this platform's."""

    def initialize(self, version, build_data):
        if os.environ.get("ROSE_BUILD_EXT") != "1":
            return
        sys.path.insert(0, self.root)
        from rose_kernels import native

        self.folder = Path(tempfile.mkdtemp(prefix="rose_native."))
        library = native.compile_into(self.folder)
        build_data["force_include"][str(library)] = f"rose_kernels/{native.library_name(native.with_cuda())}"
        build_data["pure_python"], build_data["infer_tag"] = False, True

    def finalize(self, version, build_data, artifact_path):
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)
