"""`moba-megatron prepare blend`: a mix of prepared datasets by weight and by document length.

Long documents are rare and have few sources, so training only on long documents also changes the mix of sources: more
books and code, less of the web. Here each dataset keeps its share of the tokens, and *within* it the documents of some
lengths are read more often than they occur: per-source length upsampling (arXiv 2402.10171).

For each dataset and each range of lengths there is a *view*: an index of its own over a link to the dataset's `.bin`.
Nothing is copied, and megatron-core reads a view like any dataset. `blend.yaml` names the views with their weights, for
`data.train`.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import yaml

from moba_megatron.config import BlendEntry
from moba_megatron.config.literal import literal
from moba_megatron.corpus.blend import BLEND_FILE, BlendFile
from moba_megatron.corpus.indexed import DocumentIndex, load_index, write_index
from moba_megatron.corpus.loss_mask import loss_mask_path, open_loss_mask
from moba_megatron.corpus.manifest import (
    DatasetManifest,
    FileStats,
    SourceStats,
    SplitStats,
    length_buckets,
    library_versions,
    load_manifest,
)
from moba_megatron.corpus.merge import file_hash
from moba_megatron.corpus.mix_views import Mix, MixSource, View, describe_mix, make_views, plot_mix
from moba_megatron.corpus.workspace import existing_dataset, hold, real_output


def make_blend(mix: Mix, output: Path, overwrite: bool = False) -> str:
    """Write the views, `blend.yaml`, a manifest, the tokenizer and a picture into the folder `output`.

    Returns:
        Its contents as text, with the distribution of lengths that training will read.

    Raises:
        ValueError: a source that is missing or has no manifest, sources of different tokenizers, ranges without any
            document, a source or another dataset in the way, or another process that makes it.
    """
    output = real_output(Path(output))
    _refuse_sources(mix, output)
    manifests = _manifests(mix)
    indices = [load_index(source.path) for source in mix.sources]
    identity = {
        "mix": mix.model_dump(mode="json"),
        "sources": [file_hash(Path(f"{source.path}.idx")) for source in mix.sources],
    }
    views = make_views(mix, [index.lengths for index in indices])
    report = describe_mix(views)
    # Beside the output, so that relative links hold before and after the rename.
    work = output.with_name(f"{output.name}.unfinished")
    with hold(work, output) as lock:
        if existing_dataset(output, identity, overwrite) is not None:
            return f"{report}\n{output} already holds this blend: nothing to do"
        _write_blend(mix, manifests, views, indices, work, identity)
        old = output.with_name(f"{output.name}.replaced")
        shutil.rmtree(old, ignore_errors=True)
        if output.exists():
            output.rename(old)
        work.rename(output)
        (output / lock).unlink()
        shutil.rmtree(old, ignore_errors=True)
    return f"{report}\nwrote {output}; train on it with data.train: {output / BLEND_FILE}"


def _write_blend(
    mix: Mix,
    manifests: list[DatasetManifest],
    views: list[View],
    indices: list[DocumentIndex],
    work: Path,
    identity: dict,
) -> None:
    for view in views:
        _write_view(view, indices[mix.sources.index(view.source)], work)
    shutil.copytree(_folder(mix.sources[0]) / "tokenizer", work / "tokenizer")
    entries = BlendFile(entries=[BlendEntry(path=view.name, weight=view.weight) for view in views])
    (work / BLEND_FILE).write_text(yaml.safe_dump(literal(entries.model_dump()), sort_keys=False), encoding="utf-8")
    manifest = _manifest(mix, manifests, views, work, identity)
    manifest.save(work)
    plot_mix(views, work / "blend.png")


def _refuse_sources(mix: Mix, output: Path) -> None:
    """Views are links: replacing a dataset that they point to would leave nothing to read."""
    for source in mix.sources:
        # Where the prefix is, and where its data are if it is a view itself.
        for place in (Path(f"{source.path}.idx"), Path(f"{source.path}.bin").resolve()):
            if output.resolve() in place.absolute().resolve().parents:
                raise ValueError(f"{output} holds the data of {source.path}: a blend needs a folder of its own")


def _manifests(mix: Mix) -> list[DatasetManifest]:
    manifests = []
    for source in mix.sources:
        manifest = load_manifest(_folder(source))
        if manifest is None:
            raise ValueError(f"{source.path}: no manifest.json beside it; make it with `moba-megatron prepare`")
        manifests.append(manifest)
        if manifest.tokenizer.fingerprint != manifests[0].tokenizer.fingerprint:
            raise ValueError(
                f"{source.path} was made with another tokenizer (fingerprint {manifest.tokenizer.fingerprint}) than "
                f"{mix.sources[0].path} ({manifests[0].tokenizer.fingerprint}): prepare both with the same one"
            )
    return manifests


def _folder(source: MixSource) -> Path:
    return Path(source.path).parent


def _write_view(view: View, index: DocumentIndex, folder: Path) -> None:
    prefix, offsets = folder / view.name, index.offsets[view.documents]
    write_index(prefix, index.dtype, view.documents.size, lambda: [view.lengths], lambda: [offsets])
    for target in (Path(f"{view.source.path}.bin"), loss_mask_path(view.source.path)):
        if target.is_file():
            link = folder / (view.name + target.name.removeprefix(Path(view.source.path).name))
            link.symlink_to(os.path.relpath(target.absolute(), folder.resolve()))


def _manifest(
    mix: Mix, manifests: list[DatasetManifest], views: list[View], folder: Path, identity: dict
) -> DatasetManifest:
    return DatasetManifest(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        dtype=manifests[0].dtype,
        splits={
            view.name: SplitStats(
                documents=view.documents.size,
                tokens=view.tokens,
                target_tokens=_target_tokens(folder / view.name),
                characters=None,
                bytes=None,
                longest=int(view.lengths.max()),
                lengths=length_buckets(view.lengths),
            )
            for view in views
        },
        unigram_loss=None,
        tokenizer=manifests[0].tokenizer,
        sources=[
            SourceStats(
                kind="prepared",
                path=source.path,
                inputs=1,
                input_bytes=Path(f"{source.path}.bin").stat().st_size,
                documents=sum(view.documents.size for view in views if view.source is source),
                bytes=None,
                hash=identity["sources"][number],
            )
            for number, source in enumerate(mix.sources)
        ],
        filtered=0,
        skipped=[],
        skipped_total=0,
        files={
            f"{view.name}.idx": FileStats(
                bytes=(folder / f"{view.name}.idx").stat().st_size, hash=file_hash(folder / f"{view.name}.idx")
            )
            for view in views
        },
        command=shlex.join(sys.argv),
        identity=identity,
        seconds=0,
        workers=1,
        versions=library_versions(),
    )


def _target_tokens(prefix: Path) -> int | None:
    mask = open_loss_mask(prefix)
    if mask is None:
        return None
    index = load_index(prefix)
    starts = index.offsets // index.dtype.itemsize
    return sum(int(np.count_nonzero(mask[a : a + n])) for a, n in zip(starts, index.lengths, strict=True))
