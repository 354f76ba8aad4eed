# SPDX-License-Identifier: GPL-2.0-or-later
"""Build the guest kernels from `src/` with gcc and binutils: `python -m vmm.guests.build [DIRECTORY]`.

The images are reproducible: the same toolchain gives the same bytes.  Which toolchain made the images in
the tree is recorded beside them, in `TOOLCHAIN`, so that a test knows whether to expect equal bytes.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = HERE / "src"
TOOLCHAIN = HERE / "TOOLCHAIN"

_COMMON = ("header.S", "start.S", "console.c", "options.c")
_TRAPS = ("trap.S", "trap.c")

#: kernel name -> its source files
KERNELS: dict[str, tuple[str, ...]] = {
    "fuzz": (*_COMMON, *_TRAPS, "fuzz.c"),
    "idle": (*_COMMON, *_TRAPS, "idle.c"),
    "long": ("header.S", "long.S"),
    "mix": (*_COMMON, *_TRAPS, "mix.c", "mix_memory.c", "mix_user.c"),
    "nano": (*_COMMON, *_TRAPS, "nano.S", "nano.c", "nano_process.c", "nano_user.c", "mix_memory.c"),
    "primes": (*_COMMON, "primes.c"),
    "rogue": (*_COMMON, *_TRAPS, "rogue.c", "rogue_wild.c"),
    "triple": ("header.S", "triple.S"),
}
#: the same for flat images
FLAT: dict[str, tuple[str, ...]] = {"real": ("real.S",)}

_FLAGS = [
    *("-m32", "-march=i686", "-mno-sse", "-mno-mmx", "-std=gnu11", "-Os"),
    *("-Wall", "-Wextra", "-Werror", "-Wa,--fatal-warnings"),
    *("-ffreestanding", "-fno-builtin", "-fno-tree-loop-distribute-patterns", "-nostdlib"),
    *("-fno-pic", "-no-pie", "-static"),
    *("-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-fcf-protection=none"),
    *("-Wl,--build-id=none", "-Wl,--nmagic", "-Wl,-z,noexecstack", "-Wl,-z,norelro", "-Wl,--strip-all"),
]


def toolchain() -> str:
    """The compiler and linker that `build` would use, one version line each."""
    tools = (["gcc", "--version"], ["ld", "--version"])
    lines = (subprocess.run(tool, capture_output=True, text=True, check=True).stdout for tool in tools)
    return "".join(line.splitlines()[0] + "\n" for line in lines)


def build(name: str, directory: Path) -> Path:
    """Compile one kernel into `directory`.  Raises CalledProcessError with gcc's words on stderr."""
    if name in FLAT:
        image, script, sources = directory / f"{name}.bin", "flat.ld", FLAT[name]
    else:
        image, script, sources = directory / f"{name}.elf", "guest.ld", KERNELS[name]
    subprocess.run(
        ["gcc", *_FLAGS, "-T", script, *sources, "-o", str(image.absolute())],
        cwd=SOURCES,
        check=True,
    )
    return image


def main(arguments: list[str]) -> None:
    """Build every kernel; without a directory, replace the images in the tree and record the toolchain."""
    directory = Path(arguments[0]) if arguments else HERE
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        for name in (*KERNELS, *FLAT):
            image = build(name, Path(scratch))
            image.chmod(0o644)
            image.replace(directory / image.name)
    if directory == HERE:
        TOOLCHAIN.write_text(toolchain())


if __name__ == "__main__":
    main(sys.argv[1:])
