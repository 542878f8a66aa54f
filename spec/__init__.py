"""Nemotron 3 in NumPy, as a book: the definition of every layer.

Read the chapters in this order; each uses only earlier ones. A numbered "trap" is one of the ten mistakes
that give fluent text and wrong numbers: docs/traps.md.
"""

CHAPTERS = (
    "keys",       # the keys of config.json
    "config",     # one name for each size
    "tensors",    # every tensor of a checkpoint
    "arrays",     # the letters of shapes
    "numerics",   # precision and rounding
    "norm",       # two norms
    "conv",       # the causal convolution
    "scan",       # the recurrence of Mamba-2
    "state",      # the memory of each layer
    "attention",  # attention without positions
    "moe",        # router and experts
    "ops",        # the operations of a backend
    "mixers",     # four kinds of layer
    "model",      # the assembly
    "mtp",        # the prediction head
    "sample",     # from logits to a token
    "tokenizer",  # from text to token ids and back
    "tools",      # functions that a model may call
    "chat",       # from a conversation to text
    "layout",     # tensor, expert and pipeline parallelism
    "shard",      # the part of the model on each rank
    "ranks",      # the messages between ranks
    "quant",      # weights in 8 or 4 bits
    "blocks",     # weights of GGUF files
)  # fmt: skip
