"""The end of `prepare`: shards become the dataset, their statistics the manifest."""

from __future__ import annotations

import hashlib
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from moba_megatron.corpus.documents import CorpusError, Incomplete
from moba_megatron.corpus.duplicates import Duplicates, find_duplicates
from moba_megatron.corpus.indexed import token_dtype
from moba_megatron.corpus.manifest import (
    DatasetManifest,
    DuplicateEntry,
    FileStats,
    SkippedEntry,
    SourceStats,
    SplitStats,
    TokenizerStats,
    library_versions,
    plot_lengths,
    split_stats,
    unigram_loss,
)
from moba_megatron.corpus.merge import Merged, merge
from moba_megatron.corpus.prepare_plan import PlaceNames, PreparePlan, beginnings
from moba_megatron.corpus.recipe import FilesSource, Recipe, StdlibSource
from moba_megatron.corpus.rows import missing_columns
from moba_megatron.corpus.shards import MAX_LISTED, RECORD, SPLITS, IncompleteRow, ShardStats, shard_folder
from moba_megatron.corpus.sources import files_root
from moba_megatron.corpus.tokenizer import Tokenizer
from moba_megatron.corpus.workspace import Workspace


def merge_shards(plan: PreparePlan, tokenizer: Tokenizer, space: Workspace) -> DatasetManifest:
    """Build the whole dataset folder in the work folder; `seconds` and `workers` of its manifest are still 0.

    Raises:
        CorpusError: a split that the recipe wants has no document.
        ValueError: a shard was damaged since it was made.
    """
    shutil.rmtree(space.dataset, ignore_errors=True)
    space.dataset.mkdir()
    shards = [shard_folder(space.folder, number) for number in range(len(plan.parts))]
    stats = _read_stats(shards)
    complete = {part.source for part, stat in zip(plan.parts, stats, strict=True) if stat.complete}
    check_columns(plan, complete, {part: stat.incomplete for part, stat in enumerate(stats) if stat.incomplete})
    wanted = _wanted_splits(plan.recipe)
    for name in wanted:
        if not any(stat.splits[name].documents for stat in stats):
            raise CorpusError(_empty_split(name, plan, stats))
    shutil.copytree(space.tokenizer, space.dataset / "tokenizer")
    duplicates = None
    if plan.recipe.filters.exact_duplicates == "drop":
        duplicates = find_duplicates(shards, space.folder / "duplicates")
    dtype, masked = token_dtype(tokenizer.vocab_size), plan.recipe.masked
    merged = {
        name: merge(shards, name, space.dataset / name, dtype, tokenizer.vocab_size, masked, duplicates)
        for name in wanted
    }
    for name in wanted:
        if not merged[name].documents:
            raise CorpusError(f"all documents of {name} are duplicates of others: filters.exact_duplicates = drop")
    manifest = _manifest(plan, tokenizer, space, stats, merged, duplicates)
    plot_lengths(manifest.splits, space.dataset / "lengths.png")
    return manifest


def check_columns(plan: PreparePlan, complete: set[int], incomplete: Mapping[int, Incomplete | IncompleteRow]) -> None:
    """Look for a source in which no row has the named columns.

    Args:
        complete: numbers of the sources of which some row has them.
        incomplete: of the parts, by their number, in which some row does not, the first such row.

    Raises:
        CorpusError: with the first row of such a source.
    """
    for number, row in incomplete.items():
        if plan.parts[number].source not in complete:
            raise CorpusError(missing_columns(PlaceNames(plan).of(number, row.number), row.reason, row.present))


def _read_stats(shards: list[Path]) -> list[ShardStats]:
    """The statistics of all shards, which together list no more skipped rows than a manifest does."""
    stats, room = [], MAX_LISTED
    for shard in shards:
        own = ShardStats.model_validate_json((shard / "stats.json").read_bytes())
        own.skipped = own.skipped[:room]
        room -= len(own.skipped)
        stats.append(own)
    return stats


def _manifest(
    plan: PreparePlan,
    tokenizer: Tokenizer,
    space: Workspace,
    stats: list[ShardStats],
    merged: dict[str, Merged],
    duplicates: Duplicates | None,
) -> DatasetManifest:
    assert space.engine is not None, "shards are made before they are merged"
    (engine, reason), names = space.engine, PlaceNames(plan)
    skipped = [(part, row) for part, stat in enumerate(stats) for row in stat.skipped]
    hashes = {name: digest for own in merged.values() for name, digest in own.hashes.items()}
    return DatasetManifest(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        dtype=token_dtype(tokenizer.vocab_size).name,
        splits={name: _split_stats(name, merged[name], stats, plan.recipe.masked) for name in merged},
        unigram_loss=unigram_loss(*(merged[name].counts for name in SPLITS)) if len(merged) == len(SPLITS) else None,
        tokenizer=TokenizerStats(
            fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            eod_token=tokenizer.eod_token,
            eod_id=tokenizer.eod_id,
            begin_of_documents=_beginning(plan.recipe, tokenizer),
            engine=engine,
            engine_reason=reason,
        ),
        sources=[_source_stats(number, plan, stats, list(merged.values())) for number in range(len(plan.inputs))],
        filtered=sum(stat.filtered for stat in stats),
        skipped=[
            *(SkippedEntry(name=shown(name), reason=why) for name, why in plan.left_out[:MAX_LISTED]),
            *(SkippedEntry(name=shown(names.of(part, row.number)), reason=row.reason) for part, row in skipped),
        ],
        skipped_total=len(plan.left_out) + sum(stat.skipped_total for stat in stats),
        notes=_notes(stats),
        duplicates=_listed_duplicates(duplicates, space, names),
        duplicates_total=duplicates.total if duplicates else 0,
        files={
            name: FileStats(bytes=(space.dataset / name).stat().st_size, hash=digest) for name, digest in hashes.items()
        },
        command=shlex.join(sys.argv),
        identity=plan.identity,
        seconds=0,
        workers=0,
        versions=library_versions(),
    )


def shown(name: str) -> str:
    """A name as JSON can hold it: a file system's may be no UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


def _beginning(recipe: Recipe, tokenizer: Tokenizer) -> str:
    found = beginnings(recipe, tokenizer)
    kinds = [kind for kind, there in (("text", recipe.texts), ("prompt", recipe.prompts)) if there]
    return next((tokenizer.decode(found[kind]) for kind in kinds if found.get(kind)), "")


def _notes(stats: list[ShardStats]) -> dict[str, int]:
    notes: Counter[str] = Counter()
    for stat in stats:
        notes.update({what: count for what, count in stat.notes.items() if count})
    return dict(sorted(notes.items()))


def _split_stats(name: str, merged: Merged, stats: list[ShardStats], masked: bool) -> SplitStats:
    characters = sum(stat.splits[name].characters for stat in stats)
    utf8_bytes = sum(stat.splits[name].bytes for stat in stats)
    for _, dropped_characters, dropped_bytes in merged.dropped.values():
        characters, utf8_bytes = characters - int(dropped_characters), utf8_bytes - int(dropped_bytes)
    return split_stats(merged, characters, utf8_bytes, masked)


def _listed_duplicates(duplicates: Duplicates | None, space: Workspace, names: PlaceNames) -> list[DuplicateEntry]:
    if duplicates is None:
        return []

    def name(document: int) -> str:
        part = int(np.searchsorted(duplicates.first_documents, document, side="right")) - 1
        place = (document - int(duplicates.first_documents[part])) * RECORD.itemsize
        record = np.fromfile(shard_folder(space.folder, part) / "documents", RECORD, 1, offset=place)
        return names.of(part, int(record["number"][0]))

    return [DuplicateEntry(name=shown(name(again)), first=shown(name(first))) for again, first in duplicates.listed]


def _wanted_splits(recipe: Recipe) -> list[str]:
    hashed = {"train", "validation"} if recipe.split.validation > 0 else {"train"}
    wanted = {split for source in recipe.sources for split in (hashed if source.split == "hash" else {source.split})}
    return [split for split in SPLITS if split in wanted]


def _empty_split(name: str, plan: PreparePlan, stats: list[ShardStats]) -> str:
    total = sum(size.documents for stat in stats for size in stat.splits.values())
    if total:
        share = f"split.validation = {plan.recipe.split.validation}"
        return f"no document of {total} falls into {name} ({share}): change the share, set it to 0, or add documents"
    skipped, filtered = sum(stat.skipped_total for stat in stats), sum(stat.filtered for stat in stats)
    found = next(((part, row) for part, stat in enumerate(stats) for row in stat.skipped), None)
    first = f" (first {PlaceNames(plan).of(found[0], found[1].number)}: {found[1].reason})" if found else ""
    return f"no documents: {skipped} could not be read{first}, {filtered} left out by filters"


def _source_stats(number: int, plan: PreparePlan, stats: list[ShardStats], merged: list[Merged]) -> SourceStats:
    source, inputs = plan.recipe.sources[number], plan.inputs[number]
    parts = [place for place, part in enumerate(plan.parts) if part.source == number]
    own = [stats[part] for part in parts]
    dropped = [split.dropped[part] for split in merged for part in parts if part in split.dropped]
    digest = hashlib.blake2b("".join(stat.hash for stat in own).encode(), digest_size=16)
    return SourceStats(
        kind=source.kind,
        path=str(files_root(source)) if isinstance(source, FilesSource | StdlibSource) else source.path,
        inputs=len(inputs),
        input_bytes=sum(item.size for item in inputs),
        documents=sum(size.documents for stat in own for size in stat.splits.values())
        - sum(int(documents) for documents, _, _ in dropped),
        bytes=sum(stat.text_bytes for stat in own) - sum(int(utf8_bytes) for _, _, utf8_bytes in dropped),
        hash=digest.hexdigest(),
    )
