"""Write files: the book, random checkpoints, the tokenizer of the released models."""
