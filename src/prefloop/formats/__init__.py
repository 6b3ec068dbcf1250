"""Import and export: TRL's dataset formats, OpenAI chat logs, tau-bench runs, tool-call lists; JSON and Parquet."""

from prefloop.formats.importing import FORMATS, ImportReport, RowError, import_file, iter_prompts
from prefloop.formats.limits import Limits

__all__ = ["FORMATS", "ImportReport", "Limits", "RowError", "import_file", "iter_prompts"]
