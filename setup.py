"""Install `engine/`, `graphs/`, `kernels/`, `scripts/` and `conf/` as `makeready.*`.

The code folders sit at the top of the tree so that the architecture is the first thing a
reader sees. The three of the library hold no `__init__.py` of their own: a top-level package named `kernels` would be
taken by transformers for Hugging Face's `kernels`.
"""

from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
# What each folder consists of: the commands find their options in conf/ beside scripts/, as in the tree.
FOLDERS = {"engine": "*.py", "graphs": "*.py", "kernels": "*.py", "scripts": "*.py", "conf": "*.yaml"}


def packages() -> dict[str, str]:
    """Map every dotted package name to its folder, relative to this file."""
    found = {}
    for top, files in FOLDERS.items():
        for folder in (ROOT / top, *sorted((ROOT / top).rglob("*"))):
            if folder.is_dir() and any(folder.glob(files)):
                path = folder.relative_to(ROOT)
                found["makeready." + ".".join(path.parts)] = str(path)
    return found


# A plain library for ctypes, without Python.h. Optional: where there is no C compiler the install goes on
# and kernels/native.py leaves the work to PyTorch. No -ffast-math: NaN and infinity must stay what they are.
CPU_OPS = Extension(
    "makeready.kernels._cpu_ops",
    sorted(str(path.relative_to(ROOT)) for path in (ROOT / "kernels" / "csrc").glob("*.c")),
    depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "kernels" / "csrc").glob("*.h")),
    extra_compile_args=["-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-pthread"],
    extra_link_args=["-pthread"],
    optional=True,
)

PACKAGES = packages()
setup(
    packages=list(PACKAGES),
    package_dir=PACKAGES,
    package_data={
        **{name: ["*.yaml"] for name in PACKAGES if name.startswith("makeready.conf")},
        "makeready.kernels": ["csrc/*.cu", "csrc/*.h"],  # compiled when a plan is made
        "makeready.engine.server": ["page/built/*"],  # what make page built
    },
    ext_modules=[CPU_OPS],
)
