"""Import and export: TRL's dataset formats, OpenAI chat logs, tau-bench runs, tool-call lists; JSON and Parquet."""

from prefloop.formats.exporting import export_dataset, export_trajectories
from prefloop.formats.importing import FORMATS, ImportReport, RowError, import_file, iter_prompts
from prefloop.formats.limits import Limits

__all__ = [
    "FORMATS",
    "ImportReport",
    "Limits",
    "RowError",
    "export_dataset",
    "export_trajectories",
    "import_file",
    "iter_prompts",
]
