"""Text from a trained model.

`loading` makes a model of transformers out of a Hugging Face folder or of a checkpoint, `engine` continues a prompt
with it through a cache, `sampling` chooses its tokens, `streaming` shows the text as it comes.
"""
