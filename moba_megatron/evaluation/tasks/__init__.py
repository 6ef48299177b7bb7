"""Synthetic long-range tasks that need no download and no instruction tuning.

`puzzles` poses them, `compose` hides them in text of an exact length (`haystack`), `scoring` asks a model by likelihood
and by greedy match.
"""

from moba_megatron.evaluation.tasks.compose import make_samples
from moba_megatron.evaluation.tasks.haystack import Haystack, load_haystack
from moba_megatron.evaluation.tasks.puzzles import TASKS
from moba_megatron.evaluation.tasks.sample import Sample, Task, TaskTokenizer, target_text

__all__ = ["TASKS", "Haystack", "Sample", "Task", "TaskTokenizer", "load_haystack", "make_samples", "target_text"]
