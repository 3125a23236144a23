"""Fused kernels for attention, arrays in and arrays out, and the table that chooses among them.

A kernel honours everything that a task asks for, or refuses and says why; it never leaves a mask out. The libraries
that the kernels are from load when one of them runs.
"""

from axlearn.common.attention_kernels._table import TABLE as TABLE
from axlearn.common.attention_kernels._table import XLA as XLA
from axlearn.common.attention_kernels._table import AttentionChoice as AttentionChoice
from axlearn.common.attention_kernels._table import AttentionKernel as AttentionKernel
from axlearn.common.attention_kernels._table import choose_kernel as choose_kernel
from axlearn.common.attention_kernels._table import collect_attention_choices as collect_attention_choices
from axlearn.common.attention_kernels._table import describe_attention_choice as describe_attention_choice
from axlearn.common.attention_kernels._task import AttentionArrays as AttentionArrays
from axlearn.common.attention_kernels._task import AttentionTask as AttentionTask
from axlearn.common.attention_kernels._task import Window as Window
from axlearn.common.attention_kernels._tpu_splash import SPLASH_BLOCK_FIELDS as SPLASH_BLOCK_FIELDS
