"""Tokenizer, chat template, incremental text and stop strings. No torch, no engine."""

from cluster.tokenizer.chat_template import ChatTemplate
from cluster.tokenizer.detokenizer import IncrementalDetokenizer
from cluster.tokenizer.export import write_tokenizer_directory
from cluster.tokenizer.stop_matcher import StopMatcher
from cluster.tokenizer.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "IncrementalDetokenizer", "StopMatcher", "Tokenizer", "write_tokenizer_directory"]
