"""The end of `prepare`: shards become the dataset, their statistics the manifest."""

from __future__ import annotations

import hashlib
import shutil
from datetime import UTC, datetime
from pathlib import Path

from moba_megatron.data.documents import CorpusError
from moba_megatron.data.encode import MAX_SKIPPED, SPLITS, ShardStats, shard_folder
from moba_megatron.data.indexed import merge, token_dtype
from moba_megatron.data.manifest import (
    Manifest,
    SourceStats,
    TokenizerStats,
    library_versions,
    plot_lengths,
    split_stats,
    unigram_loss,
)
from moba_megatron.data.plan import Plan
from moba_megatron.data.recipe import FilesSource, Recipe, StdlibSource
from moba_megatron.data.sources import files_root
from moba_megatron.data.tokenizer import Tokenizer
from moba_megatron.data.workspace import Workspace


def merge_shards(plan: Plan, tokenizer: Tokenizer, space: Workspace) -> Manifest:
    """Build the whole dataset folder in the work folder; `seconds` and `workers` of its manifest are still 0.

    Raises:
        CorpusError: a split that the recipe wants has no document.
        ValueError: a shard was damaged since it was made.
    """
    shutil.rmtree(space.dataset, ignore_errors=True)
    space.dataset.mkdir()
    shards = [shard_folder(space.folder, number) for number in range(len(plan.parts))]
    stats = [ShardStats.model_validate_json((shard / "stats.json").read_text()) for shard in shards]
    wanted = _wanted_splits(plan.recipe)
    for name in wanted:
        if not any(stat.splits[name].documents for stat in stats):
            raise CorpusError(_empty_split(name, plan.recipe, stats))
    shutil.copytree(space.tokenizer, space.dataset / "tokenizer")
    manifest = _merge_splits(plan, tokenizer, space, shards, stats, wanted)
    plot_lengths(manifest.splits, space.dataset / "lengths.png")
    return manifest


def _merge_splits(
    plan: Plan, tokenizer: Tokenizer, space: Workspace, shards: list[Path], stats: list[ShardStats], wanted: list[str]
) -> Manifest:
    dtype, size = token_dtype(tokenizer.vocab_size), tokenizer.vocab_size
    merged = {name: merge(shards, name, space.dataset / name, dtype, size) for name in wanted}
    assert space.engine is not None, "shards are made before they are merged"
    engine, reason = space.engine
    return Manifest(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        dtype=dtype.name,
        splits={
            name: split_stats(
                merged[name],
                characters=sum(stat.splits[name].characters for stat in stats),
                utf8_bytes=sum(stat.splits[name].bytes for stat in stats),
            )
            for name in wanted
        },
        unigram_loss=unigram_loss(*(merged[name].counts for name in SPLITS)) if len(wanted) == len(SPLITS) else None,
        tokenizer=TokenizerStats(
            fingerprint=tokenizer.fingerprint,
            vocab_size=size,
            eod_token=tokenizer.eod_token,
            eod_id=tokenizer.eod_id,
            engine=engine,
            engine_reason=reason,
        ),
        sources=[_source_stats(number, plan, stats) for number in range(len(plan.inputs))],
        filtered=sum(stat.filtered for stat in stats),
        skipped=[entry for stat in stats for entry in stat.skipped][:MAX_SKIPPED],
        skipped_total=sum(stat.skipped_total for stat in stats),
        identity=plan.identity,
        seconds=0,
        workers=0,
        versions=library_versions(),
    )


def _wanted_splits(recipe: Recipe) -> list[str]:
    hashed = {"train", "validation"} if recipe.split.validation > 0 else {"train"}
    wanted = {split for source in recipe.sources for split in (hashed if source.split == "hash" else {source.split})}
    return [split for split in SPLITS if split in wanted]


def _empty_split(name: str, recipe: Recipe, stats: list[ShardStats]) -> str:
    total = sum(size.documents for stat in stats for size in stat.splits.values())
    if total:
        share = f"split.validation = {recipe.split.validation}"
        return f"no document of {total} falls into {name} ({share}): change the share, set it to 0, or add documents"
    skipped, filtered = sum(stat.skipped_total for stat in stats), sum(stat.filtered for stat in stats)
    first = next((f" (first {entry.name}: {entry.reason})" for stat in stats for entry in stat.skipped), "")
    return f"no documents: {skipped} unreadable{first}, {filtered} left out by filters"


def _source_stats(number: int, plan: Plan, stats: list[ShardStats]) -> SourceStats:
    source, inputs = plan.recipe.sources[number], plan.inputs[number]
    own = [stat for part, stat in zip(plan.parts, stats, strict=True) if part.source == number]
    digest = hashlib.blake2b("".join(stat.hash for stat in own).encode(), digest_size=16)
    return SourceStats(
        kind=source.kind,
        path=str(files_root(source)) if isinstance(source, FilesSource | StdlibSource) else source.path,
        inputs=len(inputs),
        input_bytes=sum(item.size for item in inputs),
        documents=sum(size.documents for stat in own for size in stat.splits.values()),
        bytes=sum(stat.text_bytes for stat in own),
        hash=digest.hexdigest(),
    )
