"""From text to token ids and back: tokenizer, stop strings, chat templates and their sandbox."""
