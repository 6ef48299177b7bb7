"""Settings and results of the operator's benchmark."""

from __future__ import annotations

from dataclasses import dataclass, field

DTYPES = ("fp32", "bf16", "fp16", "fp64")
MODES = ("fwd", "fwd+bwd")
INPUTS = ("random", "sink", "hot", "local")


@dataclass(frozen=True)
class BenchRouter:
    """A router that chooses blocks instead of queries and keys; as `attention.router_dim` and the settings beside it.

    Attributes:
        dim: head size, an even number.
        heads: `key` or `query`.
        keys: `shared` or `key`.
        loss: `none`, `sparse` or `dense`; a part of forward and backward together, not of `fwd`.
    """

    dim: int
    heads: str = "key"
    keys: str = "shared"
    loss: str = "sparse"

    def __post_init__(self) -> None:
        if self.dim < 2 or self.dim % 2:
            raise ValueError(f"bench: --router-dim {self.dim} is not a positive even number of channels")
        known = {"heads": ("key", "query"), "keys": ("shared", "key"), "loss": ("none", "sparse", "dense")}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"bench: unknown --router-{name} {getattr(self, name)!r}; choose from {list(values)}")

    def sizes(self, heads: int, kv_heads: int) -> tuple[int, int, int]:
        """Router heads, router key heads and head size beside so many query and key heads."""
        return (kv_heads if self.heads == "key" else heads), (1 if self.keys == "shared" else kv_heads), self.dim

    @property
    def words(self) -> str:
        """For a table.

        >>> BenchRouter(32).words
        '32, key/shared, sparse'
        """
        return f"{self.dim}, {self.heads}/{self.keys}, {self.loss}"


@dataclass(frozen=True)
class BenchSettings:
    """What to measure.

    Attributes:
        lengths: tokens of the one document.
        blocks: (block size in tokens, top-k in blocks) pairs.
        dtypes: names out of fp32, bf16, fp16, fp64.
        modes: `fwd`, `fwd+bwd`.
        num_heads, num_kv_heads, head_size: query heads, key heads, head size.
        backend: as in `moba_attention`; `auto` is resolved and reported.
        full: full-attention backends, the fastest of which is the baseline; those that cannot run are left out. Empty:
            no baseline, for lengths at which full attention would take hours.
        runs: timed runs of each side, after one warm-up.
        threads: CPU threads for both; 0 leaves the process's setting.
        device: `cpu` or `cuda`.
        seed: of the inputs.
        inputs: which blocks queries like, see `benchmark.inputs`.
        limit: seconds after which a case makes no further runs; None: all runs.
        router: what chooses blocks instead of queries and keys, if anything.
    """

    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
    blocks: tuple[tuple[int, int], ...] = ((512, 3),)
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    modes: tuple[str, ...] = MODES
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 64
    backend: str = "gathered"
    full: tuple[str, ...] = ("torch",)
    runs: int = 5
    threads: int = 0
    device: str = "cpu"
    seed: int = 0
    inputs: str = "random"
    limit: float | None = None
    router: BenchRouter | None = None

    def __post_init__(self) -> None:
        for name, known, given in (("dtypes", DTYPES, self.dtypes), ("modes", MODES, self.modes)):
            unknown = [value for value in given if value not in known]
            if unknown:
                raise ValueError(f"bench: unknown {name} {unknown}; choose from {list(known)}")
        if self.inputs not in INPUTS:
            raise ValueError(f"bench: unknown inputs {self.inputs!r}; choose from {list(INPUTS)}")
        if self.runs < 1 or self.threads < 0 or not self.lengths or min(self.lengths) < 1:
            raise ValueError(
                f"bench: runs and lengths must be at least 1 and threads at least 0, "
                f"got runs {self.runs}, lengths {self.lengths}, threads {self.threads}"
            )


@dataclass(frozen=True)
class Case:
    """One line to measure; floor and goal are speed-ups, None where there is no target."""

    dtype: str
    length: int
    block_size: int
    top_k: int
    mode: str
    floor: float | None = None
    goal: float | None = None


@dataclass(frozen=True)
class BenchRow:
    """One measured line; times in seconds, memory in bytes, operations per second.

    `extra_bytes` is a lower bound of the memory beyond inputs, output and gradients, see above. `dense_seconds` and
    `speedup` are None without a baseline, `share_of_peak` on machines without a data sheet here, `flash_moba_seconds`
    where that package cannot run. `hottest` is how often the most chosen block is chosen, over the mean of all.
    `rows_scored_again` and `tiles_scored_again` are shares of the query rows for which screening proves no choice, and
    of the tiles that are therefore scored in full; None where nothing is screened.
    """

    dtype: str
    num_heads: int
    num_kv_heads: int
    length: int
    block_size: int
    top_k: int
    mode: str
    backend: str
    moba_seconds: float
    dense_seconds: float | None
    dense_by: str
    speedup: float | None
    pair_ratio: float
    attended_flops: float
    share_of_peak: float | None
    extra_bytes: int
    extra_over_q: float
    inputs: str = "random"
    hottest: float = 1.0
    flash_moba_seconds: float | None = None
    rows_scored_again: float | None = None
    tiles_scored_again: float | None = None
    floor: float | None = None
    goal: float | None = None
    router: str = ""

    @property
    def curve(self) -> tuple[str, int, int, int, int, str]:
        """What rows of different lengths have in common."""
        return self.dtype, self.num_heads, self.num_kv_heads, self.block_size, self.top_k, self.mode


@dataclass
class BenchResult:
    """All rows, the settings that were refused with the reason, those at which MoBA is full attention, and the length
    at which MoBA starts to win."""

    rows: list[BenchRow] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    full: list[str] = field(default_factory=list)

    def crossovers(self) -> dict[tuple[str, int, int, int, int, str], int | None]:
        """Per `BenchRow.curve` the shortest measured length from which on MoBA is always faster."""
        winners = {}
        for key in dict.fromkeys(row.curve for row in self.rows if row.speedup is not None):
            start = None
            for row in sorted((r for r in self.rows if r.curve == key), key=lambda r: r.length, reverse=True):
                if row.speedup is None or row.speedup < 1:
                    break
                start = row.length
            winners[key] = start
        return winners


def pair_ratio(length: int, block_size: int, top_k: int) -> float:
    """Pairs of full causal attention over attended pairs, counted by whole blocks; 1 where top_k covers all blocks.

    >>> round(pair_ratio(32768, 512, 3), 1), round(pair_ratio(32768, 128, 8), 1)
    (13.0, 17.3)
    """
    blocks = length / block_size
    if blocks <= top_k:
        return 1.0
    return blocks**2 / ((2 * top_k - 1) * blocks - top_k * (top_k - 1))
