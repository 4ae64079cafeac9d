"""Install `engine/`, `graphs/`, `kernels/` and `conf/` as `makeready.*`.

The three code folders sit at the top of the tree so that the architecture is the first thing a
reader sees. They hold no `__init__.py` of their own: a top-level package named `kernels` would be
taken by transformers for Hugging Face's `kernels`.
"""

from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
LAYERS = ("engine", "graphs", "kernels")


def packages() -> dict[str, str]:
    """Map every dotted package name to its folder, relative to this file."""
    found = {f"makeready.{layer}": layer for layer in LAYERS}
    for layer in LAYERS:
        for folder in sorted((ROOT / layer).rglob("*")):
            if folder.is_dir() and any(folder.glob("*.py")):
                path = folder.relative_to(ROOT)
                found["makeready." + ".".join(path.parts)] = str(path)
    return found


# A plain library for ctypes, without Python.h. Optional: where there is no C compiler the install goes on
# and kernels/native.py leaves the work to PyTorch. No -ffast-math: NaN and infinity must stay what they are.
CPU_OPS = Extension(
    "makeready.kernels._cpu_ops",
    ["kernels/csrc/cpu_ops.c"],
    extra_compile_args=["-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"],
    optional=True,
)

PACKAGES = packages()
setup(packages=list(PACKAGES), package_dir=PACKAGES, ext_modules=[CPU_OPS])
