"""The small corpus, for all tests here."""

from small_corpus import dataset, recipe, text_folder, texts, tokenizer

__all__ = ["dataset", "recipe", "text_folder", "texts", "tokenizer"]
