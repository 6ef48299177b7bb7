"""From sources of text to an indexed dataset: `prepare(recipe, output)`.

    sources -> parts -> workers (read, split, encode) -> shards -> merge -> OUTPUT

All work happens in OUTPUT.partial beside the output: the tokenizer (trained or copied), one shard per part, at the end
the merged dataset, which then takes its name by one rename. So a run killed at any moment leaves either nothing new, or
finished shards that the next run keeps, or the whole dataset. Errors of the file system keep the work too; only one
that asks for another recipe or other files discards it. Shards are numbered by part and merged in that order: the bytes
are the same for any number of workers and any number of kills.

Encoding by gigatoken is held against `tokenizers` on a sample of every shard. One difference anywhere discards all
shards and starts again with `tokenizers`.

OUTPUT holds `train.bin/.idx`, `validation.bin/.idx`, `tokenizer/`, `manifest.json` and `lengths.png`. The manifest
carries the *identity* of the dataset: the recipe, the names, sizes and modification times of the inputs, the tokenizer.
A second run with an equal identity returns at once; with another one it is refused unless `overwrite` is given.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from rich.console import Console

from moba_megatron.data.documents import MIB, CorpusError, Document
from moba_megatron.data.encode import Job, choose_split, encode_part, has_shard, start_worker
from moba_megatron.data.finish import merge_shards
from moba_megatron.data.manifest import Manifest
from moba_megatron.data.plan import Plan, make_plan
from moba_megatron.data.progress import encoding_progress
from moba_megatron.data.recipe import Recipe, TrainedTokenizer
from moba_megatron.data.sources import read_part
from moba_megatron.data.tokenizer import EngineMismatch, Tokenizer, choose_engine, copy_tokenizer, train_bpe
from moba_megatron.data.workspace import Workspace, existing_dataset, open_workspace, remove_leftovers


def prepare(recipe: Recipe, output: Path, workers: int | None = None, overwrite: bool = False) -> Manifest:
    """Turn a recipe's text into megatron-core's indexed format. Progress goes to stderr.

    With more than one worker, scripts need the usual `if __name__ == "__main__"` guard.

    Args:
        recipe: see `moba_megatron.data.recipe`.
        output: folder to make. OUTPUT.partial beside it is used for work and removed.
        workers: processes that encode. Default: the cores that this process may use, fewer for a small corpus. The
            result does not depend on it.
        overwrite: replace a dataset made of something else, or discard unfinished work on one.

    Returns:
        The manifest, of a dataset made now or found complete.

    Raises:
        ValueError: nothing to read, a missing column or tokenizer, an empty split, or another dataset in the way.
        OSError: reading or writing failed. Finished shards are kept, as they are when the process is killed.
    """
    console, begin = Console(stderr=True), time.monotonic()
    output, plan = Path(output), make_plan(recipe)
    workers = workers or _default_workers(plan)
    found = existing_dataset(output, plan.identity, overwrite)
    if found is not None:
        console.print(f"{output} already holds this dataset: nothing to do")
        remove_leftovers(output, plan.identity)
        return found
    with open_workspace(output, plan.identity, overwrite) as space:
        # Again under the lock: another run may have published since.
        found = existing_dataset(output, plan.identity, overwrite)
        if found is not None:
            console.print(f"{output} was finished by another run meanwhile: nothing to do")
            space.discard()
            return found
        try:
            tokenizer = _make_tokenizer(plan, space, console)
            _encode_all(plan, tokenizer, space, workers, console)
            manifest = merge_shards(plan, tokenizer, space)
        except CorpusError:
            space.discard()
            raise
        manifest.seconds, manifest.workers = time.monotonic() - begin, workers
        manifest.save(space.dataset)
        space.publish(output)
    console.print(f"wrote {output} in {manifest.seconds:.1f} s")
    return manifest


def _default_workers(plan: Plan) -> int:
    """All cores, but no process for less than 16 MiB of text: it takes longer to start than to encode that."""
    cores, sizes = len(os.sched_getaffinity(0)), [part.size for part in plan.parts]
    return min(cores, max(1, sum(sizes) // (16 * MIB))) if all(sizes) else cores


def _make_tokenizer(plan: Plan, space: Workspace, console: Console) -> Tokenizer:
    """Train or copy the tokenizer, once."""
    if space.tokenizer.is_dir():
        return Tokenizer(space.tokenizer)
    spec, unfinished = plan.recipe.tokenizer, space.folder / "tokenizer.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    if isinstance(spec, TrainedTokenizer):
        begin = time.monotonic()
        with console.status(f"training a byte-level BPE of {spec.vocab_size:,} entries"):
            train_bpe(_training_texts(plan, spec.max_training_bytes), spec.vocab_size, unfinished)
        console.print(f"trained a byte-level BPE of {spec.vocab_size:,} entries in {time.monotonic() - begin:.1f} s")
    else:
        copy_tokenizer(spec.path, unfinished, spec.end_of_document)
    unfinished.rename(space.tokenizer)
    return Tokenizer(space.tokenizer)


def _training_texts(plan: Plan, max_bytes: int | None) -> Iterator[str]:
    seen = 0
    for part in plan.parts:
        source = plan.recipe.sources[part.source]
        for item in read_part(source, part):
            if not isinstance(item, Document) or choose_split(plan.recipe, source, item) != "train":
                continue
            if max_bytes is not None and seen >= max_bytes:
                return
            seen += len(item.utf8)
            yield item.text


def _encode_all(plan: Plan, tokenizer: Tokenizer, space: Workspace, workers: int, console: Console) -> None:
    """Make the shards that are missing, by one engine."""
    engine, reason = space.engine or choose_engine(tokenizer, plan.recipe.tokenizer.engine)
    space.set_engine((engine, reason))
    job = Job(plan.recipe.model_dump_json(), space.folder.resolve(), tokenizer.fingerprint, engine)
    try:
        _make_shards(plan, job, workers, console)
    except EngineMismatch as error:
        console.print(f"{error}; starting again with tokenizers")
        shutil.rmtree(space.shards)
        space.set_engine(("tokenizers", str(error)))
        _encode_all(plan, tokenizer, space, workers, console)


def _make_shards(plan: Plan, job: Job, workers: int, console: Console) -> None:
    for leftover in job.work.glob("shards/*.unfinished"):
        shutil.rmtree(leftover)
    todo = [(n, part) for n, part in enumerate(plan.parts) if not has_shard(job.work, n)]
    if len(todo) < len(plan.parts):
        console.print(f"continuing: {len(plan.parts) - len(todo)} of {len(plan.parts)} parts are there already")
    with encoding_progress(console, [part.size for part in plan.parts], [part.size for _, part in todo]) as advance:
        if workers == 1 or len(todo) <= 1:
            for number, part in todo:
                advance(part.size, encode_part(job, number, part).text_bytes)
            return
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(min(workers, len(todo)), mp_context=spawn, initializer=start_worker)
        try:
            futures = {pool.submit(encode_part, job, number, part): part for number, part in todo}
            for future in as_completed(futures):
                advance(futures[future].size, future.result().text_bytes)
        finally:
            pool.shutdown(cancel_futures=True)
