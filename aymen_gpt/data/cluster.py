"""Parts of a source prepared by the tasks of datatrove (https://github.com/huggingface/datatrove).

Task r of n does what ``python fineweb.py --part {r + 1}/{n}`` does, on this machine, under Slurm or on Ray;
``python fineweb.py --merge`` makes the shards. docs/data-format.md has an example.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from aymen_gpt.data import shares
from aymen_gpt.data.prepare import PrepareOptions, Progress
from aymen_gpt.errors import UsageError

try:
    from datatrove.pipeline.base import PipelineStep
except ImportError:
    PipelineStep = object


class PreparePart(PipelineStep):
    """The one step of a pipeline. Documents neither enter nor leave it: the source and the result are files."""

    name = "Prepare part"
    type = "Aymen-GPT"

    def __init__(self, options: PrepareOptions) -> None:
        if PipelineStep is object:
            raise UsageError("datatrove is not installed: pip install 'aymen-gpt[datatrove]'")
        super().__init__()
        self.options = options

    def run(self, data: Iterable[Any] | None = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        from datatrove.utils.logging import logger

        def report(event: Progress | str) -> None:
            if isinstance(event, str):
                logger.info(event)

        summary = shares.SharePreparation(self.options, rank + 1, world_size, report).run()
        self.stat_update("documents", value=summary.totals.documents, unit="task")
        self.stat_update("tokens", value=summary.totals.tokens, unit="task")
        yield from data or ()
