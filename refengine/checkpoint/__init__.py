"""Checkpoints on disk: finding, opening, matching with the tensor table, and writing.

locate           the name that a user gives -> the model's directory
hub              a model's name -> its directory in the local Hugging Face cache
safetensors_file one file: its header, its tensors as read-only views of a memory map
names            a tensor's name in a file -> its name in the tensor table
packed           the tensors that make one packed weight
planned          what a checkpoint would hold whose weights are not here
match            the tensors in the files <-> the tensor table of the spec
directory        a Hugging Face directory, opened: `Checkpoint`
fingerprint      the digest of a model's weights, in any layout of files
generation_config  its recommended options of sampling
write            a directory, written
random_values    values for the tensors of a random model
"""

from refengine.checkpoint.directory import INDEX, Checkpoint

__all__ = ["INDEX", "Checkpoint"]
