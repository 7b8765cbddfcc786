"""What a model still knows: lm-eval with paired uncertainty, and divergence from the original.

Importing this loads neither torch nor lm-eval; the functions do. ``divergence`` is a module of its own and loads torch.
"""

from moeprune.evaluate.compare import compare
from moeprune.evaluate.harness import evaluate_model
from moeprune.evaluate.results import GroupResult, ModelResult, TaskResult
from moeprune.evaluate.table import results_table
from moeprune.evaluate.tasks import TaskSelection, check_tasks

__all__ = [
    "GroupResult",
    "ModelResult",
    "TaskResult",
    "TaskSelection",
    "check_tasks",
    "compare",
    "evaluate_model",
    "results_table",
]
