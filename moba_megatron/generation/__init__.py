"""Text from a trained model.

`loading` makes a model of transformers out of a Hugging Face folder or of a checkpoint, `engine` continues a prompt
with it through a cache, `streaming` shows the text as it comes, `sampling` chooses tokens and is the definition that
the engine is held against.
"""
