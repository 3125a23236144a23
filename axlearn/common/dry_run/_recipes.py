"""Which of many recipes is the largest that fits, in little time."""

import contextlib
import gc
import itertools
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, Optional, Union

import jax

from axlearn.common.config import InstantiableConfig
from axlearn.common.dry_run._report import estimated_needs
from axlearn.common.dry_run._silence import silence
from axlearn.common.trainer import MemoryThere, SpmdTrainer, format_bytes
from axlearn.common.utils import HybridMeshShape, MeshShape, infer_mesh_shape

# The number of parameters that a name speaks of, such as fuji-7B-v2 or gala-85M.
_SIZE = re.compile(r"(?<![0-9A-Za-z.])(\d+(?:\.\d+)?)([MBT])(?![0-9A-Za-z])")
_UNITS = {"M": 1e6, "B": 1e9, "T": 1e12}
# At the least, over all devices: a parameter, its gradient and two moments, in float32.
_BYTES_PER_PARAMETER = 16
# What decides over the memory of a step. Variants of a recipe often differ in nothing of it.
_DECISIVE_FIELDS = (
    "model",
    "learner",
    "input",
    "mesh_shape",
    "mesh_axis_names",
    "batch_axis_names",
    "train_dtype",
)


class _OutOfTimeError(Exception):
    """The time for the search is over."""


class _Candidate(NamedTuple):
    name: str
    cfg: InstantiableConfig
    num_parameters: int


class _Built(NamedTuple):
    name: str
    trainer: SpmdTrainer
    least_bytes: int


class _Fit(NamedTuple):
    name: str
    num_parameters: int
    needed_bytes: int


def largest_recipe_text(
    candidates: Mapping[str, Callable[[], InstantiableConfig]],
    *,
    there: MemoryThere,
    timeout_seconds: float,
) -> str:
    """Returns a sentence that names the largest recipe whose dry run fits.

    Args:
        candidates: Makes the trainer config of each recipe, by its name. What cannot be built here is passed over.
        there: The memory there.
        timeout_seconds: After how long to go by what has been looked at until then, in seconds of this process on
            its processors: what else a machine does is to change no answer. Half as long again goes to small
            recipes where large ones have taken it all.
    """
    search = _Search(candidates, there=there, timeout_seconds=timeout_seconds)
    with silence(), _no_collection():
        search.run()
    return search.text()


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """A context without garbage collection: it goes through all that jax has loaded, for a sixth of the time here."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Search:
    """A search, cheapest looks first: names, then configs and their models' parameters, then trainers, then steps."""

    def __init__(
        self,
        candidates: Mapping[str, Callable[[], InstantiableConfig]],
        *,
        there: MemoryThere,
        timeout_seconds: float,
    ) -> None:
        self._candidates = candidates
        self._there = there
        self._deadline = time.process_time() + timeout_seconds
        self._reserve_seconds = timeout_seconds / 2
        self._best: Optional[_Fit] = None
        self._num_seen = 0
        self._is_over = True
        # Parameters of the models seen so far. Recipes are often variants of each other that share one.
        self._sizes: list[tuple[InstantiableConfig, int]] = []
        # What trainers have been built of: the first of several that take as much stands for all.
        self._built_cfgs: list[InstantiableConfig] = []

    def run(self) -> None:
        """Looks until the answer is known or time is up."""
        order = _in_order(self._candidates, there=self._there)
        try:
            for names in order.by_size:
                self._look_at(names)
                if self._best is not None:
                    break
        except _OutOfTimeError:
            self._is_over = False
            self._deadline = time.process_time() + self._reserve_seconds
        try:
            # Their names do not say that they are smaller than what has been found.
            self._look_at(order.unknown)
            if self._best is None and self._is_over:
                self._look_at(order.unlikely)
        except _OutOfTimeError:
            self._is_over = False

    def text(self) -> str:
        """The sentence about what was found."""
        if self._best is not None:
            of = "listed recipe"
            if not self._is_over:
                of = f"of {self._num_seen} out of {len(self._candidates)} listed recipes"
            needed = format_bytes(self._best.needed_bytes)
            return f"The largest {of} that fits here is {self._best.name}, which needs {needed} per device."
        if self._is_over:
            return "None of the listed recipes fits here."
        return "No listed recipe was found to fit here, in the little time that there is for the search."

    def _look_at(self, names: Iterable[str]) -> None:
        """Finds the largest of some recipes that fits and is larger than what has been found."""
        counted = [candidate for name in names if (candidate := self._counted(name)) is not None]
        by_size = sorted(counted, key=lambda c: -c.num_parameters)
        for num_parameters, variants in itertools.groupby(by_size, key=lambda c: c.num_parameters):
            if self._best is not None and num_parameters <= self._best.num_parameters:
                return
            built = [trainer for variant in variants if (trainer := self._built(variant)) is not None]
            # A variant for fewer devices has a smaller batch.
            for trainer in sorted(built, key=lambda trainer: trainer.least_bytes):
                self._check_time()
                needed = self._needed_bytes(trainer)
                if needed is not None and needed <= self._there.num_bytes:
                    self._best = _Fit(trainer.name, num_parameters, needed)
                    return

    def _check_time(self) -> None:
        if time.process_time() > self._deadline:
            raise _OutOfTimeError

    def _counted(self, name: str) -> Optional[_Candidate]:
        """Counts the parameters of a recipe; None if it cannot be built here."""
        self._check_time()
        self._num_seen += 1
        try:
            cfg = self._candidates[name]()
            _check_mesh(cfg.mesh_shape)
            return _Candidate(name, cfg, self._num_parameters(cfg.model))
        except Exception:
            # A mesh for another machine, a library that is not installed, a tokenizer that is not there: whatever
            # the reason, this is a hint below an error, and another recipe will do.
            return None

    def _num_parameters(self, model: InstantiableConfig) -> int:
        for other, size in self._sizes:
            if other == model:
                return size
        layer = model.clone(name="model").instantiate(parent=None)
        specs = jax.tree.leaves(layer.create_parameter_specs_recursively())
        self._sizes.append((model, sum(math.prod(spec.shape) for spec in specs)))
        return self._sizes[-1][1]

    def _built(self, candidate: _Candidate) -> Optional[_Built]:
        """Builds a trainer; None if its state alone does not fit, it is as another one, or cannot be built here."""
        if any(_takes_as_much(candidate.cfg, cfg) for cfg in self._built_cfgs):
            return None
        self._check_time()
        self._built_cfgs.append(candidate.cfg)
        try:
            trainer: SpmdTrainer = candidate.cfg.instantiate(parent=None)
            least_bytes = trainer.programs.memory_needs().total
        except Exception:
            # As above.
            return None
        return _Built(candidate.name, trainer, least_bytes) if least_bytes <= self._there.num_bytes else None

    def _needed_bytes(self, built: _Built) -> Optional[int]:
        """Returns what a recipe takes of each device; None if its step cannot be traced."""
        try:
            return estimated_needs(built.trainer).total
        except Exception:
            # As above.
            return None


def _check_mesh(shape: Union[MeshShape, HybridMeshShape]) -> None:
    """Raises ValueError for a mesh of another number of devices, where that is easily seen."""
    if isinstance(shape, HybridMeshShape):
        return
    if math.prod(infer_mesh_shape(shape)) != jax.device_count():
        raise ValueError(f"a mesh for other machines: {shape}")


def _takes_as_much(cfg: InstantiableConfig, other: InstantiableConfig) -> bool:
    """Whether two recipes are the same as far as memory goes."""
    return all(getattr(cfg, field) == getattr(other, field) for field in _DECISIVE_FIELDS)


class _Order(NamedTuple):
    """The names of recipes, by what they say of their sizes.

    Attributes:
        by_size: Those of each size that may fit, the largest size first.
        unknown: Those that say nothing.
        unlikely: Those that hardly fit, the smallest first: worth a look only where nothing else fits.
    """

    by_size: list[list[str]]
    unknown: list[str]
    unlikely: list[str]


def _in_order(names: Iterable[str], *, there: MemoryThere) -> _Order:
    # A recipe may split its state over all devices.
    limit = there.num_bytes * jax.device_count() / _BYTES_PER_PARAMETER
    unknown, groups = [], dict[float, list[str]]()
    for name in names:
        match = _SIZE.search(name)
        if match is None:
            unknown.append(name)
        else:
            groups.setdefault(float(match.group(1)) * _UNITS[match.group(2)], []).append(name)
    sizes = sorted(groups)
    return _Order(
        by_size=[groups[size] for size in reversed(sizes) if size <= limit],
        unknown=unknown,
        unlikely=[name for size in sizes if size > limit for name in groups[size]],
    )
