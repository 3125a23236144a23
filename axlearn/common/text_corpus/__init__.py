"""Files of text as a corpus: which files, which of them are held out, a tokenizer of their own, their tokens.

A corpus is read where it lies. Its tokens are computed once and cached; see `docs/data.md`.
"""

from axlearn.common.text_corpus._corpus import Document as Document
from axlearn.common.text_corpus._corpus import Skipped as Skipped
from axlearn.common.text_corpus._corpus import Split as Split
from axlearn.common.text_corpus._corpus import TextCorpus as TextCorpus
from axlearn.common.text_corpus._corpus import is_heldout as is_heldout

# Where corpora come from.
from axlearn.common.text_corpus._sources import python_standard_library as python_standard_library
from axlearn.common.text_corpus._sources import text_files as text_files

# What is computed from a corpus, once, and cached.
from axlearn.common.text_corpus._token_cache import TokenCache as TokenCache
from axlearn.common.text_corpus._token_cache import open_token_cache as open_token_cache
from axlearn.common.text_corpus._tokenizer import trained_sentencepiece as trained_sentencepiece
