"""Text into rows of token ids for language models, as functions for `input_tf_data.Input`.

What is a target in which row, and what is left out, is stated in `docs/data.md`.
"""

# Kinds of examples, and what separates the documents of a row.
from axlearn.common.input_lm._text import InputDataType as InputDataType
from axlearn.common.input_lm._text import PackingMethodType as PackingMethodType

# Text into rows.
from axlearn.common.input_lm._text import lm_text_preprocessor as lm_text_preprocessor
from axlearn.common.input_lm._text import packed_row_spec as packed_row_spec
from axlearn.common.input_lm._text import text_to_lm_eval_input as text_to_lm_eval_input
from axlearn.common.input_lm._text import text_to_lm_training_input as text_to_lm_training_input
