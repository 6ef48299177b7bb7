"""The documents that a sample of a dataset was made from."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset


def documents_of(dataset: Dataset, number: int) -> dict[str, Any]:
    """The pieces of a sample, in their order.

    Args:
        dataset: as `build_datasets` makes it, a blend or not.
        number: of the sample, from 0.

    Returns:
        `sample`, its number; `data`, the prefix of the indexed dataset that it comes from; `documents`, one
        `[document, first token within it, number of tokens]` a piece, documents counted from 0.
    """
    part: Any = dataset
    inner = number
    if hasattr(part, "datasets"):
        which, inner = int(part.dataset_index[number]), int(part.dataset_sample_index[number])
        part = part.datasets[which]
    return {"sample": number, "data": str(part.dataset_path), "documents": part._pieces(inner).tolist()}
