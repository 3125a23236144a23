"""Makes .venv ready: the one set-up step behind `make train` and `make test`.

    python3 scripts/bootstrap.py core|dev|tpu-aot

`tpu-aot` is `dev` and libtpu, with which programs for TPUs are compiled where there are none (`make test-plan`).
It needs nothing but Python's standard library, and is written so that even a Python that is too old can
read it far enough to say so. What is already installed from the same pins is left as it is.
"""

from __future__ import print_function

import hashlib
import os
import subprocess
import sys

OLDEST = (3, 11)
NEWEST = (3, 13)


def version_problem(version):
    """Returns the sentence for a Python (major, minor) that this project does not run on, else None."""
    version = tuple(version[:2])
    if OLDEST <= version <= NEWEST:
        return None
    kind = "old" if version < OLDEST else "new"
    return (
        "Python %d.%d is too %s: this project runs on Python %d.%d to %d.%d; "
        "name another one with `make PYTHON=python3.12 ...`."
        % (version[0], version[1], kind, OLDEST[0], OLDEST[1], NEWEST[0], NEWEST[1])
    )


def pins_file(root, kind, version):
    """Returns the path of the pins for a kind ("core", "dev" or "tpu-aot") and a Python version."""
    # jax from 0.11 on needs Python 3.12, so 3.11 has pins of its own; 3.12 and 3.13 share theirs.
    python = "py311" if tuple(version[:2]) == (3, 11) else "py312"
    name = python + ".txt" if kind == "dev" else kind + "-" + python + ".txt"
    return os.path.join(root, "requirements", name)


def fingerprint(root, pins):
    """Returns a digest of all that the installed environment depends on."""
    digest = hashlib.sha256()
    for path in (pins, os.path.join(root, "pyproject.toml")):
        with open(path, "rb") as f:
            digest.update(f.read())
    digest.update(("%s %d.%d" % (root, sys.version_info[0], sys.version_info[1])).encode())
    return digest.hexdigest()


def install(root, kind):
    """Creates .venv where it is missing and installs the pins of `kind` and this project into it."""
    venv = os.path.join(root, ".venv")
    python = os.path.join(venv, "bin", "python")
    if not os.path.exists(python):
        print("Creating .venv with Python %d.%d" % sys.version_info[:2], flush=True)
        subprocess.check_call([sys.executable, "-m", "venv", "--clear", venv])
    version = subprocess.check_output([python, "-c", "import sys; print(*sys.version_info[:2])"]).split()
    version = tuple(int(v) for v in version)
    problem = version_problem(version)
    if problem:
        sys.exit(".venv: " + problem)
    pins = pins_file(root, kind, version)
    stamp = os.path.join(venv, "installed-" + kind)
    want = fingerprint(root, pins)
    if os.path.exists(stamp):
        with open(stamp) as f:
            if f.read() == want:
                return
    print("Installing %s (about a minute on a first run)" % os.path.relpath(pins, root), flush=True)
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.check_call(pip + ["--require-hashes", "-r", pins])
    if kind != "tpu-aot":
        subprocess.check_call(pip + ["--no-deps", "--no-build-isolation", "-e", root])
    with open(stamp, "w") as f:
        f.write(want)


def main(argv):
    problem = version_problem(sys.version_info)
    if problem:
        return problem
    if len(argv) != 2 or argv[1] not in ("core", "dev", "tpu-aot"):
        return "usage: bootstrap.py core|dev|tpu-aot"
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if not os.path.isdir(os.path.join(root, "axlearn", "experiments")):
        return (
            "axlearn/experiments is not a folder: this checkout lost its relative links, as a zip download does; "
            "use `git clone`, or make axlearn/experiments and axlearn/launch links to ../experiments and ../launch."
        )
    try:
        # libtpu comes on top of what the tests need.
        for kind in ("dev", "tpu-aot") if argv[1] == "tpu-aot" else (argv[1],):
            install(root, kind)
    except subprocess.CalledProcessError as e:
        return "Set-up failed at: %s (exit status %d). Its own message stands above." % (
            " ".join(str(a) for a in e.cmd[:6]),
            e.returncode,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
