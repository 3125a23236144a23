"""Functions that make datasets out of datasets."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional, Union

from axlearn.common.config import (
    InstantiableConfig,
    error_message,
    maybe_instantiate,
    maybe_set_config,
    similar_names,
)
from axlearn.common.input_tf_data._dataset import (
    BuildDatasetFn,
    Dataset,
    DatasetToDatasetFn,
    DescribedSource,
    load_grain,
)

_Source = Union[BuildDatasetFn, InstantiableConfig[BuildDatasetFn]]
_Processor = Union[DatasetToDatasetFn, InstantiableConfig[DatasetToDatasetFn]]


def identity() -> DatasetToDatasetFn:
    """Returns a function that returns its dataset as it is."""
    return lambda dataset: dataset


def chain(args: Sequence[_Processor]) -> DatasetToDatasetFn:
    """Returns a function that applies other ones, the first first.

    Args:
        args: The functions, or their configs.
    """
    fns = [maybe_instantiate(fn) for fn in args]

    def process(dataset: Dataset) -> Dataset:
        for fn in fns:
            dataset = fn(dataset)
        return dataset

    return process


def with_processor(
    source: _Source, *, processor: _Processor, is_training: Optional[bool] = None
) -> BuildDatasetFn:
    """Returns a source with a processor behind it.

    Args:
        source: The source, or its config.
        processor: The processor, or its config.
        is_training: Set in both configs where they have the field and it is not None.
    """
    source_fn, processor_fn = _instantiated(source, is_training), _instantiated(processor, is_training)
    return DescribedSource(
        lambda: processor_fn(source_fn()),
        **{name: getattr(source_fn, name, None) for name in ("vocab_size", "fingerprint", "write_assets")},
    )


def sample_from_datasets(
    *, sources: Sequence[_Source], weights: Sequence[float], is_training: Optional[bool] = None
) -> BuildDatasetFn:
    """Returns a mixture of sources.

    Example i of the mixture is of a source that the weights decide, in even proportions all along and not by
    lot: among the first n examples, those of a source are as many as its weight says, give or take one.

    Args:
        sources: Sources of random access, or their configs. With the end of one the mixture ends, so sources
            for training should have none.
        weights: The proportions, all positive; they are divided by their sum.
        is_training: As in `with_processor`.

    Raises:
        ValueError: If weights are missing or not positive.
    """
    check_weights(weights, num_sources=len(sources))
    fns = [_instantiated(source, is_training) for source in sources]

    def build() -> Dataset:
        datasets = [_random_access(fn(), what="a mixture") for fn in fns]
        return datasets[0] if len(datasets) == 1 else load_grain().MapDataset.mix(datasets, weights=weights)

    return DescribedSource(build, fingerprint=lambda: _fingerprint(fns))


def _fingerprint(fns: Sequence[BuildDatasetFn]) -> dict[str, Union[str, int, float, None]]:
    """Returns what the sources are a function of beyond their configs."""
    of_sources = (getattr(fn, "fingerprint", None) for fn in fns)
    return {
        name: value
        for of_source in of_sources
        if of_source is not None
        for name, value in of_source().items()
    }


def check_weights(weights: Sequence[float], *, num_sources: int) -> None:
    """Raises ValueError unless there is a positive weight for each source."""
    if not num_sources or len(weights) != num_sources or not all(weight > 0 for weight in weights):
        raise ValueError(
            error_message(
                where="weights",
                what=f"{list(weights)} are no weights of {num_sources} sources",
                expected="one positive number per source, and at least one source",
            )
        )


def concatenate_datasets(*, sources: Sequence[_Source], is_training: Optional[bool] = None) -> BuildDatasetFn:
    """Returns sources behind each other; for evaluation, since sources for training have no end.

    Args:
        sources: Sources of random access, or their configs.
        is_training: As in `with_processor`.
    """
    fns = [_instantiated(source, is_training) for source in sources]

    def build() -> Dataset:
        datasets = [_random_access(fn(), what="a concatenation") for fn in fns]
        return load_grain().MapDataset.concatenate(datasets)

    return DescribedSource(build, fingerprint=lambda: _fingerprint(fns))


def rekey(key_map: Mapping[str, str], *, retain_original_inputs: bool = False) -> DatasetToDatasetFn:
    """Returns a function that gives the entries of examples other names.

    Args:
        key_map: The old name by the new one.
        retain_original_inputs: Whether to keep all entries under their old names too.
    """

    def rename(example: Mapping[str, Any]) -> dict[str, Any]:
        renamed = {new: _entry(example, old, where="rekey") for new, old in key_map.items()}
        return {**example, **renamed} if retain_original_inputs else renamed

    return lambda dataset: dataset.map(rename)


def select_fields(fields: Sequence[str]) -> DatasetToDatasetFn:
    """Returns a function that leaves out all other entries of examples."""
    return lambda dataset: dataset.map(
        lambda example: {name: _entry(example, name, where="select_fields") for name in fields}
    )


def filter_examples(
    filter_fn: Union[Callable[[Any], bool], InstantiableConfig[Callable[[Any], bool]]],
) -> DatasetToDatasetFn:
    """Returns a function that leaves out examples.

    What is left is a stream, since nobody knows what place an example has in it without counting.

    Args:
        filter_fn: Says of an example whether to keep it.
    """
    keep = maybe_instantiate(filter_fn)

    def process(dataset: Dataset) -> Dataset:
        if isinstance(dataset, load_grain().MapDataset):
            dataset = dataset.to_iter_dataset()
        return dataset.filter(keep)

    return process


def take(count: int) -> DatasetToDatasetFn:
    """Returns a function that leaves the first `count` examples."""

    def process(dataset: Dataset) -> Dataset:
        grain = load_grain()
        if isinstance(dataset, grain.MapDataset):
            return dataset[: min(count, len(dataset))]
        return grain.experimental.LimitIterDataset(dataset, count=count)

    return process


def _instantiated(fn: Any, is_training: Optional[bool]) -> Any:
    if is_training is not None and isinstance(fn, InstantiableConfig):
        fn = maybe_set_config(fn.clone(), is_training=is_training)
    return maybe_instantiate(fn)


def _random_access(dataset: Dataset, *, what: str) -> Dataset:
    if not isinstance(dataset, load_grain().MapDataset):
        raise ValueError(
            error_message(
                where="sources",
                what=f"{what} of a stream ({type(dataset).__name__})",
                expected="datasets whose examples can be addressed by number (grain.MapDataset)",
                advice="Mix the sources first, and put what makes a stream of them behind the mixture.",
            )
        )
    return dataset


def _entry(example: Mapping[str, Any], name: str, *, where: str) -> Any:
    if name not in example:
        raise ValueError(
            error_message(
                where=where,
                what=f"an example has no entry {name!r}",
                expected="one of " + ", ".join(map(repr, example)),
                nearest=similar_names(name, example),
            )
        )
    return example[name]
