"""Makes tests/assets/tokens: a small synthetic corpus and its tokenizer. The files are committed; run it to change
them.

Documents of 40 to 900 ids from a random first-order chain, with stretches repeated from far before, so that attention
has something to find.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder, get_bin_path, get_idx_path
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

FOLDER = Path(__file__).parent / "tokens"
VOCABULARY = 128
END = 0
DOCUMENTS = {"train": 90, "validation": 20}


def document(random: np.random.Generator, chain: np.ndarray) -> np.ndarray:
    length = int(random.integers(40, 900))
    ids = [int(random.integers(1, VOCABULARY))]
    while len(ids) < length:
        if len(ids) > 64 and random.random() < 0.02:
            start = int(random.integers(0, len(ids) - 32))
            ids += ids[start : start + 24]
        else:
            ids.append(int(chain[ids[-1], random.integers(0, 4)]))
    return np.array([*ids[:length], END], np.uint16)


def main() -> None:
    random = np.random.Generator(np.random.PCG64(7))
    chain = random.integers(1, VOCABULARY, (VOCABULARY, 4))
    FOLDER.mkdir(exist_ok=True)
    for split, count in DOCUMENTS.items():
        prefix = str(FOLDER / split)
        builder = IndexedDatasetBuilder(get_bin_path(prefix), dtype=np.uint16)
        for _ in range(count):
            ids = document(random, chain)
            builder.add_document(torch.from_numpy(ids.astype(np.int64)), [len(ids)])
        builder.finalize(get_idx_path(prefix))
    words = {"<|endoftext|>": END, **{f"w{i}": i for i in range(1, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    (FOLDER / "tokenizer").mkdir(exist_ok=True)
    tokenizer.save(str(FOLDER / "tokenizer/tokenizer.json"))


if __name__ == "__main__":
    main()
