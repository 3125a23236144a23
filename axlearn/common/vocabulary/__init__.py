"""Text to token ids and back.

The models trained here lose nothing: newlines, tabs, runs of spaces and every byte of every script come back
as they went in, so the bytes that a token stands for are exact and losses can be stated in nats per byte. The
tokenizers of imported models keep their own habits; what they add to a text is counted.
"""

# What inputs and text generation ask of a tokenizer, and the file that says which class a folder holds.
from axlearn.common.vocabulary._base import DESCRIPTION_FILE as DESCRIPTION_FILE
from axlearn.common.vocabulary._base import Vocabulary as Vocabulary

# The tokenizer.json of Hugging Face.
from axlearn.common.vocabulary._hugging_face import HUGGING_FACE_FILES as HUGGING_FACE_FILES
from axlearn.common.vocabulary._hugging_face import TOKENIZER_FILE as TOKENIZER_FILE
from axlearn.common.vocabulary._hugging_face import HuggingFaceVocabulary as HuggingFaceVocabulary

# Of any kind, from where it was saved.
from axlearn.common.vocabulary._load import load_vocabulary as load_vocabulary

# SentencePiece.
from axlearn.common.vocabulary._sentencepiece import SentencePieceVocabulary as SentencePieceVocabulary
from axlearn.common.vocabulary._sentencepiece import train_sentencepiece as train_sentencepiece
