"""Inputs made of functions: one that builds a dataset, and any number that turn a dataset into another.

The names are AXLearn's, whose datasets are TensorFlow's. Ours are grain's, `MapDataset` where the examples can be
addressed by number and `IterDataset` where they form a stream; there is no TensorFlow here.

A dataset is that of the whole run: it yields the examples of all processes, in one order. The batcher at its end
picks those that this process is to read, so that the order does not depend on how many processes there are.
"""

# Examples into batches.
from axlearn.common.input_tf_data._batch import batch as batch
from axlearn.common.input_tf_data._batch import default_pad_example_fn as default_pad_example_fn
from axlearn.common.input_tf_data._batch import per_feed_batch as per_feed_batch

# Datasets out of datasets.
from axlearn.common.input_tf_data._combinators import chain as chain
from axlearn.common.input_tf_data._combinators import concatenate_datasets as concatenate_datasets
from axlearn.common.input_tf_data._combinators import filter_examples as filter_examples
from axlearn.common.input_tf_data._combinators import identity as identity
from axlearn.common.input_tf_data._combinators import rekey as rekey
from axlearn.common.input_tf_data._combinators import sample_from_datasets as sample_from_datasets
from axlearn.common.input_tf_data._combinators import select_fields as select_fields
from axlearn.common.input_tf_data._combinators import take as take
from axlearn.common.input_tf_data._combinators import with_processor as with_processor

# What the functions take and return.
from axlearn.common.input_tf_data._dataset import ENDLESS as ENDLESS
from axlearn.common.input_tf_data._dataset import BuildDatasetFn as BuildDatasetFn
from axlearn.common.input_tf_data._dataset import Dataset as Dataset
from axlearn.common.input_tf_data._dataset import DatasetToDatasetFn as DatasetToDatasetFn
from axlearn.common.input_tf_data._dataset import DescribedSource as DescribedSource
from axlearn.common.input_tf_data._dataset import ShuffledExamples as ShuffledExamples
from axlearn.common.input_tf_data._dataset import VocabSource as VocabSource
from axlearn.common.input_tf_data._dataset import load_grain as load_grain

# The input.
from axlearn.common.input_tf_data._input import Input as Input

# Datasets that TensorFlow Datasets has prepared.
from axlearn.common.input_tf_data._tfds import prepared_examples as prepared_examples
from axlearn.common.input_tf_data._tfds import tfds_dataset as tfds_dataset
