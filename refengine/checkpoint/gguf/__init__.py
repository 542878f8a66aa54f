"""GGUF files: the form of models that llama.cpp reads.

file    one file: its metadata and where its tensors lie
stored  types of tensors; tensors that the converter has altered
names   a tensor's name in a file <-> its name in the tensor table
config  the metadata -> config.json
texts   the metadata -> tokenizer, chat templates, recommended sampling
parts   a model in several files, opened
write   a model, written as a GGUF file
"""

from refengine.checkpoint.gguf.parts import metadata, open_parts

__all__ = ["metadata", "open_parts"]
