"""What tasks do to each other: affinities between them, and which of them to train together."""

from fastmtl.analysis.affinity import TaskAffinity, first_order_affinity, task_affinity
from fastmtl.analysis.grouping import TaskGroups, group_tasks

__all__ = ["TaskAffinity", "TaskGroups", "first_order_affinity", "group_tasks", "task_affinity"]
