"""`moba-megatron prepare blend`: a mix of prepared datasets by weight and by document length.

Long documents are rare and come from few places, so training on long documents alone also changes what is read: more
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
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import yaml
from pydantic import Field, model_validator

from moba_megatron.config import BlendEntry, Section
from moba_megatron.data.blend import BLEND_FILE, BlendFile
from moba_megatron.data.indexed import Index, load_index, write_index
from moba_megatron.data.loss_mask import loss_mask_path, open_loss_mask
from moba_megatron.data.manifest import (
    FileStats,
    Manifest,
    SourceStats,
    SplitStats,
    length_buckets,
    library_versions,
    load_manifest,
)
from moba_megatron.data.merge import file_hash
from moba_megatron.data.mix_report import describe_mix, plot_mix
from moba_megatron.data.recipe import load_section
from moba_megatron.data.workspace import existing_dataset, hold


class MixSource(Section):
    path: str
    """Prefix of a prepared dataset (`PATH.bin`, `PATH.idx`), with its manifest beside it."""
    name: str | None = Field(default=None, pattern=r"^[\w.-]+$")
    """Of its views. Default: the name of the folder."""
    weight: float | None = Field(default=None, gt=0)
    """Share of the tokens read, relative to the other sources; given for all of them or for none. Default: its number
    of tokens."""

    @property
    def label(self) -> str:
        return self.name or Path(self.path).absolute().parent.name


class LengthRange(Section):
    at_least: int = Field(ge=1)
    """Tokens of the shortest document; the range ends where the next one begins."""
    upsample: float = Field(ge=0)
    """How many times as often as it occurs a token of these documents is read, against the other ranges of the same
    source. 0 leaves them out."""


class Mix(Section):
    """A recipe for `prepare blend`. Paths are relative to the working directory."""

    sources: list[MixSource] = Field(min_length=1)
    """What is mixed."""
    lengths: list[LengthRange] = []
    """Which lengths are read more or less often; documents shorter than the first range count once."""

    @model_validator(mode="after")
    def _distinct(self) -> Mix:
        labels = [source.label for source in self.sources]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice is not None:
            raise ValueError(f"two sources are called {twice!r}: give them different names (sources.N.name)")
        without = [number for number, source in enumerate(self.sources) if source.weight is None]
        if 0 < len(without) < len(self.sources):
            raise ValueError(
                f"sources.{without[0]}.weight is not given, others are: give every source a weight, or none (then each "
                "has that of its number of tokens)"
            )
        edges = [item.at_least for item in self.lengths]
        if edges != sorted(set(edges)):
            raise ValueError(f"lengths.*.at_least = {edges} must rise")
        return self

    @property
    def ranges(self) -> list[tuple[int, int, float]]:
        """(shortest, one more than the longest, upsample) of all lengths."""
        edges = [*((1, 1.0),) * (not self.lengths or self.lengths[0].at_least > 1)]
        edges += [(item.at_least, item.upsample) for item in self.lengths]
        stops = [at_least for at_least, _ in edges[1:]] + [2**31]
        return [(start, stop, times) for (start, times), stop in zip(edges, stops, strict=True)]


@dataclass(frozen=True)
class View:
    """Some documents of a source."""

    name: str
    source: MixSource
    documents: np.ndarray
    """Their numbers in the source, rising."""
    lengths: np.ndarray
    """[documents] int32 tokens of each."""
    weight: float
    """Share of the tokens that are read."""

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))


def load_mix(path: str | Path, overrides: list[str] | None = None) -> Mix:
    """Read a recipe for a blend from YAML, with `key.path=value` overrides.

    Raises:
        ConfigError: with one line for each unknown key, wrong type or impossible value.
    """
    return load_section(Mix, path, overrides)


def make_blend(mix: Mix, output: Path, overwrite: bool = False) -> str:
    """Write the views, `blend.yaml`, a manifest, the tokenizer and a picture into the folder `output`.

    Returns:
        What is in it, in words, with the distribution of lengths that training will read.

    Raises:
        ValueError: a source that is missing or has no manifest, sources of different tokenizers, ranges without any
            document, a source or another dataset in the way, or another process that makes it.
    """
    output = Path(output)
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
    mix: Mix, manifests: list[Manifest], views: list[View], indices: list[Index], work: Path, identity: dict
) -> None:
    for view in views:
        _write_view(view, indices[mix.sources.index(view.source)], work)
    shutil.copytree(_folder(mix.sources[0]) / "tokenizer", work / "tokenizer")
    entries = BlendFile(entries=[BlendEntry(path=view.name, weight=view.weight) for view in views])
    (work / BLEND_FILE).write_text(yaml.safe_dump(entries.model_dump(), sort_keys=False))
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


def make_views(mix: Mix, lengths: list[np.ndarray]) -> list[View]:
    """The views of a mix, source by source, short before long; those without documents are left out.

    Args:
        lengths: of each source, [documents] int32 tokens of its documents.

    Raises:
        ValueError: a source without any document in the ranges that are read.
    """
    tokens = [int(own.sum(dtype=np.int64)) for own in lengths]
    shares = [source.weight or float(own) for source, own in zip(mix.sources, tokens, strict=True)]
    views = []
    for source, own, share in zip(mix.sources, lengths, shares, strict=True):
        found = []
        for start, stop, times in mix.ranges:
            documents = np.flatnonzero((own >= start) & (own < stop))
            read = times * float(own[documents].sum(dtype=np.int64))
            if read:
                found.append((start, documents, read))
        if not found:
            longest = int(own.max(initial=0))
            raise ValueError(
                f"{source.path} has no document of a length that is read (its longest has {longest} tokens): correct "
                "`lengths`, or leave the source out"
            )
        total = sum(read for _, _, read in found)
        views += [
            View(f"{source.label}-{start}", source, documents, own[documents], share / sum(shares) * read / total)
            for start, documents, read in found
        ]
    return views


def _manifests(mix: Mix) -> list[Manifest]:
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


def _write_view(view: View, index: Index, folder: Path) -> None:
    prefix, offsets = folder / view.name, index.offsets[view.documents]
    write_index(prefix, index.dtype, view.documents.size, lambda: [view.lengths], lambda: [offsets])
    for target in (Path(f"{view.source.path}.bin"), loss_mask_path(view.source.path)):
        if target.is_file():
            link = folder / (view.name + target.name.removeprefix(Path(view.source.path).name))
            link.symlink_to(os.path.relpath(target.absolute(), folder.resolve()))


def _manifest(mix: Mix, manifests: list[Manifest], views: list[View], folder: Path, identity: dict) -> Manifest:
    return Manifest(
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
