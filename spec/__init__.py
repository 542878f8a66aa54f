"""Nemotron 3 in NumPy, as a book: what every layer means.

Read the chapters in this order; each uses only earlier ones. A numbered "trap" is one of the ten mistakes
that give fluent text and wrong numbers: docs/model.md, "The ten traps".
"""

CHAPTERS = (
    "keys",       # what config.json may say
    "config",     # every size has one name
    "tensors",    # every tensor of a checkpoint
    "arrays",     # the letters of shapes
    "numerics",   # where the model rounds
    "norm",       # two norms
    "conv",       # a short memory
    "scan",       # a long memory of fixed size
    "state",      # all that is remembered
    "attention",  # an exact memory that grows
    "moe",        # many small experts
    "ops",        # the vocabulary
    "mixers",     # four kinds of layer
    "model",      # the whole
    "mtp",        # a glance ahead
    "sample",     # from numbers to a choice
    "tokenizer",  # from text to numbers and back
    "tools",      # functions that a model may call
    "chat",       # from a conversation to text
    "layout",     # how several ranks can share a model
    "shard",      # what each of them holds
    "ranks",      # what they say to each other
    "quant",      # weights in 8 or 4 bits
    "blocks",     # weights of GGUF files
)  # fmt: skip
