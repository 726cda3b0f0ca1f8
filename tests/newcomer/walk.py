"""Goes a newcomer's way: copies every command and program from docs/index.md, in order, and runs them.

python tests/newcomer/walk.py WHEEL

What is walked in is a copy of the tracked files and an environment of its own, in which the wheel is installed: where
the page installs the clone, whose version is in its history, the walk installs the wheel that was built of it. Other
packages are borrowed from the environment that runs this, so that what is installed is not the network's business.
"""

import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "index.md"
ABORTED = "terminate called without an active exception"
FENCE = re.compile(r"^```(bash|python|diff)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def main() -> None:
    wheel = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as folder:
        clone, environment = Path(folder, "nusam"), Path(folder, "environment")
        _copy(clone)
        _make(environment, wheel)
        variables = _variables(environment, wheel)
        program = None
        for kind, title, text in blocks(PAGE.read_text("utf-8")):
            if kind == "python":
                program = clone / title
                program.write_text(text, "utf-8")
            elif kind == "diff":
                assert program is not None, "a diff before any program"
                program.write_text(applied(text, program.read_text("utf-8")), "utf-8")
            else:
                _run(text.replace('install ".[', 'install "nusam['), clone, variables)  # the copy has no history


def blocks(page: str) -> Iterator[tuple[str, str, str]]:
    """Language, title and text of every block that a newcomer would copy."""
    for match in FENCE.finditer(page):
        yield match[1], match[2] or "", match[3]


def applied(diff: str, program: str) -> str:
    """The program with its one place changed that is the diff's old side.

    Raises:
        ValueError: if there is no such place, or more than one.
    """
    sides = {
        sign: "".join(line[1:] for line in diff.splitlines(keepends=True) if line[0] in (" ", sign)) for sign in "-+"
    }
    if (places := program.count(sides["-"])) != 1:
        raise ValueError(f"The old side of the diff is in the program {places} times, not once.")
    return program.replace(sides["-"], sides["+"])


def _copy(clone: Path) -> None:
    tracked = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
    for name in filter(None, tracked):
        target = clone / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())


def _make(environment: Path, wheel: Path) -> None:
    venv.create(environment, with_pip=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    # behind the environment's own packages, so that the wheel is found before a checkout's editable install
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [environment / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall"]
    subprocess.run([*pip, wheel], check=True)
    for script in ("torchrun",):  # console scripts are not borrowed with their packages
        target = environment / "bin" / script
        target.write_text(f"#!{environment}/bin/python\nfrom torch.distributed.run import main\nmain()\n")
        target.chmod(0o755)


def _variables(environment: Path, wheel: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "NUSAM", "PIP"))}
    return {
        **kept,
        "PATH": f"{environment}/bin{os.pathsep}{os.environ['PATH']}",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_QUIET": "1",
        "PIP_FIND_LINKS": str(wheel.parent),
        "OMP_NUM_THREADS": "1",
    }


def _run(commands: str, clone: Path, variables: dict[str, str]) -> None:
    start = time.perf_counter()
    for _ in range(2):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands], cwd=clone, env=variables, text=True, capture_output=True
        )
        # threads of gloo may abort a process that ends under load, after its work (pytorch/pytorch#190489)
        if not (done.returncode and "torchrun" in commands and ABORTED in done.stderr):
            break
    seconds = time.perf_counter() - start
    print(f"{shlex.quote(commands.strip())}: {seconds:.0f} s", flush=True)
    if done.returncode:
        sys.exit(f"{done.stdout}\n{done.stderr}\nA command of docs/index.md failed: {commands}")
    print("    " + "\n    ".join(done.stdout.splitlines()[-3:]), flush=True)


if __name__ == "__main__":
    main()
