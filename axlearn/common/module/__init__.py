"""Modules: trees of configured objects whose methods run as pure functions of a state and a PRNG key.

A module holds no arrays. While one of its methods runs, the thread's current `InvocationContext` says what
its state, its PRNG key and its place for outputs are. `functional` opens the first context; calling a child's
public method opens a context for the child, with the child's part of each.
"""

from axlearn.common.module._context import REMAT_NAME as REMAT_NAME
from axlearn.common.module._context import ContextStack as ContextStack
from axlearn.common.module._context import InvocationContext as InvocationContext
from axlearn.common.module._context import SharedModuleInfo as SharedModuleInfo
from axlearn.common.module._context import child_context as child_context
from axlearn.common.module._context import clone_context_stack as clone_context_stack
from axlearn.common.module._context import current_context as current_context
from axlearn.common.module._context import install_context_stack as install_context_stack
from axlearn.common.module._context import set_current_context as set_current_context
from axlearn.common.module._functional import functional as functional
from axlearn.common.module._module import ChildNameConflictError as ChildNameConflictError
from axlearn.common.module._module import InvalidDescendantError as InvalidDescendantError
from axlearn.common.module._module import Module as Module
from axlearn.common.module._outputs import OutputCollection as OutputCollection
from axlearn.common.module._outputs import OutputConflictError as OutputConflictError
from axlearn.common.module._outputs import new_output_collection as new_output_collection
from axlearn.common.module._scan import scan_in_context as scan_in_context
from axlearn.common.module._wrap import nowrap as nowrap
