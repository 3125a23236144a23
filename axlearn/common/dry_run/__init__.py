"""What a run would take, found out without running it: arrays, shardings, memory and FLOPs from shapes alone."""

from axlearn.common.dry_run._recipes import largest_recipe_text as largest_recipe_text
from axlearn.common.dry_run._report import ArrayRow as ArrayRow
from axlearn.common.dry_run._report import DryRun as DryRun
from axlearn.common.dry_run._report import dry_run as dry_run
from axlearn.common.dry_run._report import estimated_needs as estimated_needs
from axlearn.common.dry_run._silence import silence as silence
from axlearn.common.dry_run._text import dry_run_text as dry_run_text
