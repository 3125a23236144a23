"""Arrays and where they live: trees, device meshes, shardings, and what to keep for the backward pass."""

from axlearn.common.utils._mesh import HybridMeshShape as HybridMeshShape
from axlearn.common.utils._mesh import MeshShape as MeshShape
from axlearn.common.utils._mesh import build_mesh as build_mesh
from axlearn.common.utils._mesh import create_device_mesh as create_device_mesh
from axlearn.common.utils._mesh import current_mesh as current_mesh
from axlearn.common.utils._mesh import infer_mesh_shape as infer_mesh_shape
from axlearn.common.utils._mesh import use_mesh as use_mesh
from axlearn.common.utils._remat import RematPolicy as RematPolicy
from axlearn.common.utils._remat import RematVerdict as RematVerdict
from axlearn.common.utils._remat import combine_fn as combine_fn
from axlearn.common.utils._remat import combine_remat_policies as combine_remat_policies
from axlearn.common.utils._remat import offload_dots_saveable as offload_dots_saveable
from axlearn.common.utils._remat import (
    save_and_offload_only_these_names_regex as save_and_offload_only_these_names_regex,
)
from axlearn.common.utils._replace import replace_layer_config_recursively as replace_layer_config_recursively
from axlearn.common.utils._sharding import BatchPart as BatchPart
from axlearn.common.utils._sharding import DataPartitionType as DataPartitionType
from axlearn.common.utils._sharding import DroppedAxes as DroppedAxes
from axlearn.common.utils._sharding import NestedPartitionSpec as NestedPartitionSpec
from axlearn.common.utils._sharding import TensorSpec as TensorSpec
from axlearn.common.utils._sharding import applicable_spec as applicable_spec
from axlearn.common.utils._sharding import batch_part as batch_part
from axlearn.common.utils._sharding import data_partition_type_to_spec as data_partition_type_to_spec
from axlearn.common.utils._sharding import fit_to_mesh as fit_to_mesh
from axlearn.common.utils._sharding import global_to_host_array as global_to_host_array
from axlearn.common.utils._sharding import host_to_global_array as host_to_global_array
from axlearn.common.utils._sharding import input_partition_spec as input_partition_spec
from axlearn.common.utils._sharding import maybe_shard as maybe_shard
from axlearn.common.utils._sharding import with_sharding_constraint as with_sharding_constraint
from axlearn.common.utils._trees import Nested as Nested
from axlearn.common.utils._trees import NestedTensor as NestedTensor
from axlearn.common.utils._trees import StackedKeyArray as StackedKeyArray
from axlearn.common.utils._trees import Tensor as Tensor
from axlearn.common.utils._trees import VDict as VDict
from axlearn.common.utils._trees import cast_floats as cast_floats
from axlearn.common.utils._trees import copy_recursively as copy_recursively
from axlearn.common.utils._trees import expand_vdicts as expand_vdicts
from axlearn.common.utils._trees import flatten_items as flatten_items
from axlearn.common.utils._trees import get_recursively as get_recursively
from axlearn.common.utils._trees import match_regex_rules as match_regex_rules
from axlearn.common.utils._trees import prune_empty as prune_empty
from axlearn.common.utils._trees import prune_tree as prune_tree
from axlearn.common.utils._trees import set_recursively as set_recursively
from axlearn.common.utils._trees import split_prng_key as split_prng_key
from axlearn.common.utils._trees import tree_merge as tree_merge
from axlearn.common.utils._trees import tree_paths as tree_paths
from axlearn.common.utils._trees import vectorized_tree_map as vectorized_tree_map
