"""A folder of golden files: a text for each config and kind, or its SHA-256 sum in one file for all."""

import contextlib
import dataclasses
import fcntl
import hashlib
import pathlib
from collections.abc import Iterator

SUMS_FILE = "SHA256SUMS"


def file_name(name: str, kind: str) -> str:
    """Returns the name of the golden file of a config."""
    return f"{name}.txt" if kind == "config" else f"{name}_{kind}.txt"


def sha256(text: str) -> str:
    """Returns the sum of a text as it lies in a golden file, which ends without a newline."""
    return hashlib.sha256(text.encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class GoldenFolder:
    """The golden files of one module of recipes.

    Several processes may write to one at a time: pytest runs tests in several.

    Attributes:
        path: The folder.
        has_sums: Whether the sums of all texts are in `SHA256SUMS`, and only some of the texts beside it.
    """

    path: pathlib.Path
    has_sums: bool

    def read(self, file: str) -> str | None:
        """Returns a text without the newlines at its end; None if there is none."""
        path = self.path / file
        return path.read_text(encoding="utf-8").rstrip("\n") if path.is_file() else None

    def write(self, file: str, text: str) -> None:
        """Writes a text, if it differs from what is there."""
        if self.read(file) != text:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / file).write_text(text, encoding="utf-8")

    def sums(self) -> dict[str, str]:
        """Returns the sums by file."""
        text = self.read(SUMS_FILE) if self.has_sums else None
        return {file: digest for digest, file in (line.split() for line in (text or "").splitlines())}

    def write_sum(self, file: str, digest: str) -> None:
        """Writes a sum among the others."""
        with self._locked():
            sums = self.sums()
            if sums.get(file) != digest:
                self._write_sums({**sums, file: digest})

    def files(self) -> set[str]:
        """Returns the names of the texts that are there."""
        return {path.name for path in self.path.glob("*.txt")}

    def remove(self, files: set[str]) -> None:
        """Removes texts and sums."""
        for file in files:
            (self.path / file).unlink(missing_ok=True)
        if self.has_sums and files & set(self.sums()):
            with self._locked():
                self._write_sums({f: digest for f, digest in self.sums().items() if f not in files})

    def _write_sums(self, sums: dict[str, str]) -> None:
        lines = [f"{digest}  {file}\n" for file, digest in sorted(sums.items())]
        (self.path / SUMS_FILE).write_text("".join(lines), encoding="utf-8")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / SUMS_FILE, "a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
