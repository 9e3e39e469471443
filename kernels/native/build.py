"""Compiling the native step: once per machine, into a cache folder.

The library's name is a hash of the sources, the compiler, its flags and so the CPU's features: nothing stale is ever
loaded, and caches may be shared between machines. Two workers that start at once compile once: the first holds a lock.
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent
LIBRARY = "step.so"
COMPILE_TIMEOUT_S = 300.0

# -ffp-contract=off: a product and a sum are fused only where the source says `fma`, so every build gives the same bits.
_FLAGS = ("-std=c++20", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-fvisibility=hidden", "-pthread")
_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni")

# The best first, each with what it needs of the CPU, by the names in /proc/cpuinfo. Linux may still deny tiles to
# "amx": it then runs as "avx512".
INSTRUCTIONS = {
    "amx": (*_AVX512, "amx_tile", "amx_int8"),
    "avx512": _AVX512,
    "avx2": _AVX2,
    "portable": (),
}

_NO_COMPILER = (
    "no C++ compiler: install g++ or clang++, or `pip install ziglang`, or name one in $CXX (without it numpy and "
    "torch serve the same numbers, some thirty times slower)"
)


def build(instructions: str | None = None) -> Path:
    """The compiled library, compiled now if it is not in the cache. Takes about ten seconds the first time.

    `instructions`: one of INSTRUCTIONS; None takes what $TOKENMILL_INSTRUCTIONS names, or else the best that this CPU
    has and the compiler knows. Raises RuntimeError without a working compiler, or when the environment names what this
    CPU has not.
    """
    compiler = _compiler()
    if compiler is None:
        raise RuntimeError(_NO_COMPILER)
    instructions = instructions or _named_instructions() or _best_known_to(compiler)
    flags = [*_FLAGS, *_instruction_flags(instructions)]
    folder = _cache_folder() / _fingerprint(compiler, flags)
    library = folder / LIBRARY
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder / "lock"):
        if not library.exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                _compile(compiler, flags, Path(scratch)).replace(library)
    return library


def available() -> str | None:
    """None when the native step can run here, else the reason why not. Compiles nothing."""
    if sys.byteorder != "little":
        return "the native step needs a little-endian machine"
    return _NO_COMPILER if _compiler() is None else None


def best_instructions() -> str:
    """The fastest of the library's instruction sets that this CPU has."""
    return next(name for name in INSTRUCTIONS if not missing_features(name))


def missing_features(instructions: str) -> set[str]:
    """What this CPU lacks of an instruction set."""
    return set(INSTRUCTIONS[instructions]) - _cpu_features()


def _named_instructions() -> str | None:
    """What the environment wants instead of the best."""
    named = os.environ.get("TOKENMILL_INSTRUCTIONS")
    if named in INSTRUCTIONS and (missing := missing_features(named)):
        raise RuntimeError(f"TOKENMILL_INSTRUCTIONS is {named}, but this CPU lacks {', '.join(sorted(missing))}")
    return named


def _best_known_to(compiler: tuple[str, ...]) -> str:
    """As `best_instructions`, without what the compiler is too old for: AMX came with gcc 11 and clang 12."""
    here = [name for name in INSTRUCTIONS if not missing_features(name)]
    newer = [name for name in here if name in ("amx", "avx512")]
    return next((name for name in newer if _knows(compiler, _instruction_flags(name))), here[len(newer)])


@functools.cache
def _knows(compiler: tuple[str, ...], flags: tuple[str, ...]) -> bool:
    """Compiles nothing with these flags."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "nothing.cpp"
        source.touch()
        command = [*compiler, *flags, "-c", str(source), "-o", str(source.with_suffix(".o"))]
        return subprocess.run(command, capture_output=True, timeout=COMPILE_TIMEOUT_S, check=False).returncode == 0


def _instruction_flags(instructions: str) -> tuple[str, ...]:
    if instructions not in INSTRUCTIONS:
        raise ValueError(f"unknown instructions {instructions!r}; there are {', '.join(INSTRUCTIONS)}")
    names = (feature.replace("avx512_", "avx512").replace("_", "-") for feature in INSTRUCTIONS[instructions])
    return tuple(f"-m{name}" for name in names)


def _cpu_features() -> set[str]:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return set()
    if sys.platform == "darwin":
        names = subprocess.run(["sysctl", "-n", "machdep.cpu"], capture_output=True, text=True, check=False).stdout
        return set(names.lower().split())
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("flags"):
                return set(line.split())
    return set()


@functools.cache
def _compiler() -> tuple[str, ...] | None:
    if named := os.environ.get("CXX"):
        command = shlex.split(named)
        return tuple(command) if command and shutil.which(command[0]) else None
    for name in ("g++", "clang++", "c++"):
        if found := shutil.which(name):
            return (found,)
    if importlib.util.find_spec("ziglang") is not None:
        # Its own default is this very CPU; the instruction flags alone are to decide.
        return (sys.executable, "-m", "ziglang", "c++", "-mcpu=baseline")
    return None


def _cache_folder() -> Path:
    root = os.environ.get("TOKENMILL_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "tokenmill") / "native"


def _sources() -> list[Path]:
    return sorted(path for path in SOURCES.iterdir() if path.suffix in (".cpp", ".hpp"))


def _fingerprint(compiler: tuple[str, ...], flags: list[str]) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for part in (platform.system(), platform.machine(), *compiler, *flags):
        digest.update(part.encode() + b"\0")
    for path in _sources():
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _compile(compiler: tuple[str, ...], flags: list[str], scratch: Path) -> Path:
    """Objects side by side, then one link."""
    units = [path for path in _sources() if path.suffix == ".cpp"]
    objects = [scratch / f"{unit.stem}.o" for unit in units]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        commands = [
            [*compiler, *flags, "-c", str(unit), "-o", str(to)] for unit, to in zip(units, objects, strict=True)
        ]
        list(pool.map(_run, commands))
    library = scratch / LIBRARY
    symbolic = () if sys.platform == "darwin" else ("-Wl,-Bsymbolic",)
    _run([*compiler, "-shared", "-pthread", *symbolic, *map(str, objects), "-o", str(library)])
    return library


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"the native step could not be compiled: {error}") from error
    if done.returncode:
        raise RuntimeError(f"the native step could not be compiled: {shlex.join(command)}\n{done.stderr[-4000:]}")


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time; a process that dies lets go."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
