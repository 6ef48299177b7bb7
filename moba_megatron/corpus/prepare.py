"""From sources of text to an indexed dataset: `prepare(recipe, output)`.

    sources -> parts -> workers (read, split, encode) -> shards -> merge -> OUTPUT

All work happens in OUTPUT.partial beside the output: the tokenizer (trained or copied), one shard per part, at the end
the merged dataset, which then takes its name by one rename. So a run killed at any moment leaves either nothing new, or
finished shards that the next run keeps, or the whole dataset. Errors of the file system keep the work too; only one
that asks for another recipe or other files discards it. Shards are numbered by part and merged in that order: the bytes
are the same for any number of workers and any number of kills.

Encoding by gigatoken is compared with `tokenizers` on a sample of every shard. One difference anywhere changes the
engine in plan.json; shards by the other engine do not count from then on and are made again.

Several processes, on one machine or many that see the same folder, may each do a share: every n-th part, from part i on
(`prepare_share`). The first one makes the tokenizer, the others wait for it. `merge_shares`, or a `prepare` of the
whole, then joins the shards.

OUTPUT holds `train.bin/.idx`, `validation.bin/.idx`, `tokenizer/`, `manifest.json` and `lengths.png`. The manifest
carries the *identity* of the dataset: the recipe, the names, sizes and modification times of the inputs, the tokenizer.
A second run with an equal identity returns at once; with another one it is refused unless `overwrite` is given.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from rich.console import Console

from moba_megatron.corpus.documents import MIB, CorpusError, Document, Incomplete, Part, Skipped
from moba_megatron.corpus.encode import EncodeJob, choose_split, count_progress, encode_part, start_worker
from moba_megatron.corpus.encode import Progress as EncodingProgress
from moba_megatron.corpus.encoding_bar import encoding_progress
from moba_megatron.corpus.engines import EngineMismatch, choose_engine
from moba_megatron.corpus.finish import check_columns, merge_shards
from moba_megatron.corpus.manifest import DatasetManifest, load_manifest
from moba_megatron.corpus.prepare_plan import PreparePlan, beginnings, plan_preparation
from moba_megatron.corpus.recipe import Recipe, TrainedTokenizer
from moba_megatron.corpus.shards import shard_stats
from moba_megatron.corpus.sources import read_part
from moba_megatron.corpus.tokenizer import Tokenizer, copy_tokenizer, train_bpe
from moba_megatron.corpus.workspace import (
    Workspace,
    differences,
    existing_dataset,
    is_unfinished,
    open_workspace,
    real_output,
    remove_leftovers,
    unfinished_identity,
    work_folder,
)


def prepare(recipe: Recipe, output: Path, workers: int | None = None, overwrite: bool = False) -> DatasetManifest:
    """Turn a recipe's text into megatron-core's indexed format. Progress goes to stderr.

    With more than one worker, scripts need the usual `if __name__ == "__main__"` guard.

    Args:
        recipe: see `moba_megatron.corpus.recipe`.
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
    output = real_output(Path(output))
    plan = plan_preparation(recipe, output)
    workers = workers or _default_workers(plan.parts)
    found = _finished(output, plan, overwrite, console)
    if found is not None:
        return found
    with open_workspace(output, plan.identity, overwrite) as space:
        # Again under the lock: another run may have published since.
        found = existing_dataset(output, plan.identity, overwrite)
        if found is not None:
            console.print(f"{output} was finished meanwhile by another run: nothing to do")
            space.discard()
            return found
        try:
            _encode(plan, space, list(range(len(plan.parts))), workers, console)
            return _publish(plan, space, output, workers, begin, console)
        except CorpusError:
            space.discard()
            raise


def prepare_share(
    recipe: Recipe, output: Path, share: tuple[int, int], workers: int | None = None, overwrite: bool = False
) -> None:
    """Encode parts i, i + n, i + 2n, ... of a recipe's text into OUTPUT.partial, for `share` = (i, n).

    Other processes may do other shares at the same time; their machines must see the inputs and the output under the
    same paths, on a file system that knows file locks. `merge_shares` ends the work.

    Raises:
        ValueError: as `prepare`, or a share that is not one of n, or that another process is at.
        OSError: as `prepare`.
    """
    number, shares = share
    if not 0 <= number < shares:
        raise ValueError(f"--shard {number}/{shares}: the number must be from 0 to {shares - 1}")
    console, output = Console(stderr=True), real_output(Path(output))
    plan = plan_preparation(recipe, output)
    if _finished(output, plan, overwrite, console) is not None:
        return
    own = list(range(number, len(plan.parts), shares))
    workers = workers or _default_workers([plan.parts[part] for part in own])
    with open_workspace(output, plan.identity, overwrite, share) as space:
        _encode(plan, space, own, workers, console)
        console.print(f"share {number}/{shares}: its {len(own)} of {len(plan.parts)} parts are done")


def merge_shares(output: Path, overwrite: bool = False) -> DatasetManifest:
    """Join the results of `prepare_share` into OUTPUT.

    Raises:
        ValueError: no such work, inputs that changed since, or parts that are not done yet.
    """
    console, begin, output = Console(stderr=True), time.monotonic(), real_output(Path(output))
    found = load_manifest(output) if output.is_dir() else None
    if found is not None and not is_unfinished(output, found.identity):
        console.print(f"{output} is merged already: nothing to do")
        remove_leftovers(output, found.identity)
        return found
    identity = unfinished_identity(output)
    plan = plan_preparation(Recipe.model_validate(identity["recipe"]), output)
    if plan.identity != identity:
        raise ValueError(
            f"{work_folder(output)} was made from other inputs "
            f"({differences(identity, plan.identity)}): restore them, or prepare anew with --overwrite"
        )
    found = _finished(output, plan, overwrite, console)
    if found is not None:
        return found
    with open_workspace(output, identity, overwrite=False) as space:
        engine = space.engine
        parts = range(len(plan.parts))
        missing = [part for part in parts if engine is None or shard_stats(space.folder, part, engine[0]) is None]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(plan.parts)} parts are not done, the first is part {missing[0]}: run every "
                "share to its end (share i of n does the parts i, i + n, ...), then merge"
            )
        try:
            return _publish(plan, space, output, 0, begin, console)
        except CorpusError:
            space.discard()
            raise


def _finished(output: Path, plan: PreparePlan, overwrite: bool, console: Console) -> DatasetManifest | None:
    found = existing_dataset(output, plan.identity, overwrite)
    if found is not None:
        console.print(f"{output} already holds this dataset: nothing to do")
        remove_leftovers(output, plan.identity)
    return found


def _publish(
    plan: PreparePlan, space: Workspace, output: Path, workers: int, begin: float, console: Console
) -> DatasetManifest:
    with console.status("joining shards"):
        manifest = merge_shards(plan, Tokenizer(space.tokenizer), space)
    manifest.seconds, manifest.workers = time.monotonic() - begin, workers
    manifest.save(space.dataset)
    space.publish(output)
    console.print(f"wrote {output} in {manifest.seconds:.1f} s")
    return manifest


def _default_workers(parts: list[Part]) -> int:
    """All cores, but no process for less than 16 MiB of text: it takes longer to start than to encode that."""
    cores, sizes = len(os.sched_getaffinity(0)), [part.size for part in parts]
    return min(cores, max(1, sum(sizes) // (16 * MIB))) if all(sizes) else cores


def _make_tokenizer(plan: PreparePlan, space: Workspace, console: Console) -> Tokenizer:
    """Train or copy the tokenizer, once for all shares."""
    with space.common(lambda: console.print("waiting for another share, which makes the tokenizer")):
        if space.tokenizer.is_dir():
            return Tokenizer(space.tokenizer)
        spec, unfinished = plan.recipe.tokenizer, space.folder / "tokenizer.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(spec, TrainedTokenizer):
            begin = time.monotonic()
            with console.status(f"training a byte-level BPE of {spec.vocab_size:,} entries"):
                train_bpe(_training_texts(plan, spec.max_training_bytes), spec.vocab_size, unfinished)
            seconds = time.monotonic() - begin
            console.print(f"trained a byte-level BPE of {spec.vocab_size:,} entries in {seconds:.1f} s")
        else:
            copy_tokenizer(spec.path, unfinished, spec.end_of_document)
        unfinished.rename(space.tokenizer)
        return Tokenizer(space.tokenizer)


def _training_texts(plan: PreparePlan, max_bytes: int | None) -> Iterator[str]:
    seen, complete = 0, set()
    incomplete: dict[int, Incomplete] = {}
    for number, part in enumerate(plan.parts):
        source = plan.recipe.sources[part.source]
        for item in read_part(source, part, plan.recipe.filters):
            if isinstance(item, Incomplete):
                incomplete.setdefault(number, item)
            elif not isinstance(item, Skipped):
                complete.add(part.source)
            if not isinstance(item, Document) or choose_split(plan.recipe, source, item) != "train":
                continue
            if max_bytes is not None and seen >= max_bytes:
                return
            seen += item.bytes
            yield item.text
    check_columns(plan, complete, incomplete)


def _encode(plan: PreparePlan, space: Workspace, own: list[int], workers: int, console: Console) -> None:
    """Make the missing shards among the parts `own`, by the engine that all shares agree on."""
    tokenizer = _make_tokenizer(plan, space, console)
    while True:
        with space.common(lambda: None):
            engine = space.engine or choose_engine(tokenizer, plan.recipe.tokenizer.engine, plan.recipe.texts)
            space.set_engine(engine)
        job = EncodeJob(
            recipe_json=plan.recipe.model_dump_json(),
            work=space.folder.resolve(),
            tokenizer=tokenizer.fingerprint,
            chat_template=plan.identity.get("chat_template"),
            engine=engine[0],
            beginnings=json.dumps(beginnings(plan.recipe, tokenizer)),
        )
        try:
            _make_shards(plan, job, own, workers, console)
        except EngineMismatch as error:
            console.print(f"{error}; starting again with tokenizers")
            with space.common(lambda: None):
                space.set_engine(("tokenizers", str(error)))
        # Another share may have found a difference meanwhile.
        if space.engine == engine:
            return


def _make_shards(plan: PreparePlan, job: EncodeJob, own: list[int], workers: int, console: Console) -> None:
    todo = [(n, plan.parts[n]) for n in own if shard_stats(job.work, n, job.engine) is None]
    if len(todo) < len(own):
        console.print(f"continuing: {len(own) - len(todo)} of {len(own)} parts are done already")
    sizes = [plan.parts[n].size for n in own]
    spawn = multiprocessing.get_context("spawn")
    progress = EncodingProgress(spawn.Value("q", 0), spawn.Value("q", 0))
    with encoding_progress(console, sizes, [part.size for _, part in todo], progress) as part_done:
        if workers == 1 or len(todo) <= 1:
            count_progress(progress)
            for number, part in todo:
                encode_part(job, number, part)
                part_done()
            return
        pool = ProcessPoolExecutor(min(workers, len(todo)), spawn, start_worker, (progress,))
        try:
            for future in as_completed([pool.submit(encode_part, job, number, part) for number, part in todo]):
                future.result()
                part_done()
        finally:
            pool.shutdown(cancel_futures=True)
