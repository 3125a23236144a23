"""What is kept of a compiled program: its text, its memory, and how long compiling took."""

import gzip
import json
import pathlib
from typing import NamedTuple, Optional

import jax

from axlearn.common.file_system import write_bytes_durably
from axlearn.common.trainer import CompiledMemory, compiled_memory


class CompiledFacts(NamedTuple):
    """All that a plan reads off a compiled program, small enough to keep: a plan made of it again compiles nothing.

    Attributes:
        text: From `Compiled.as_text()`.
        memory: Bytes of each device.
        host_bytes: What it holds in the memory of the host, for each device.
        seconds: What tracing, lowering and compiling took.
    """

    text: str
    memory: CompiledMemory
    host_bytes: int
    seconds: float


def compiled_facts(compiled: jax.stages.Compiled, *, seconds: float) -> CompiledFacts:
    """Returns what is to be kept of a program.

    Args:
        compiled: The program.
        seconds: What making it took.
    """
    memory, analysis = compiled_memory(compiled), compiled.memory_analysis()
    assert memory is not None, "a backend that compiles states the memory"
    assert analysis is not None
    host_bytes = (
        analysis.host_argument_size_in_bytes
        + analysis.host_output_size_in_bytes
        + analysis.host_temp_size_in_bytes
        - analysis.host_alias_size_in_bytes
    )
    return CompiledFacts(compiled.as_text() or "", memory, host_bytes, seconds)


def write_facts(facts: CompiledFacts, *, path: pathlib.Path, key: str) -> None:
    """Keeps facts in a file: a line of JSON and the text of the program, compressed with gzip.

    Args:
        facts: What is kept.
        path: The file.
        key: What `read_facts` has to know to get them.
    """
    head = {
        "key": key,
        "memory": facts.memory._asdict(),
        "host_bytes": facts.host_bytes,
        "seconds": facts.seconds,
    }
    write_bytes_durably(path, gzip.compress(f"{json.dumps(head)}\n{facts.text}".encode(), mtime=0))


def read_facts(path: pathlib.Path, *, key: str) -> Optional[CompiledFacts]:
    """Returns what `write_facts` kept under the same key; None where there is nothing of that key.

    Args:
        path: The file.
        key: The key.
    """
    if not path.is_file():
        return None
    try:
        head_text, text = gzip.decompress(path.read_bytes()).decode().split("\n", maxsplit=1)
        head = json.loads(head_text)
    except (OSError, EOFError, ValueError):
        # Half of a file is as good as none: it is made again.
        return None
    if head["key"] != key:
        return None
    return CompiledFacts(text, CompiledMemory(**head["memory"]), head["host_bytes"], head["seconds"])
