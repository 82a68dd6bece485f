"""What a run reads, looked for before the plan is printed and anything is tokenised: init.source, the training data,
held-out documents, lists of excluded ids, and the chat template.

Whether they can be used is said by those who read them; here only whether they are there, all at once, under the keys
that were typed.
"""

from __future__ import annotations

from collections.abc import Sequence

from conf.build import ConfigError
from conf.files import user_path
from conf.schema import RunConfig, SourceConfig
from conf.words import cut
from data.errors import DataError
from data.sft import NAMED
from data.sources import is_shipped
from data.text import find_files
from launch.init_source import missing_source


def refuse_missing(config: RunConfig, overrides: Sequence[str], *, continues: bool) -> None:
    """ConfigError for what is not there. A run that `continues` needs its init.source no more."""
    problems = [] if continues else [missing_source(config.init.source)]
    named = {f"data.sources.{name}": source for name, source in config.data.sources.items()}
    if config.data.validation is not None:
        named["data.validation"] = config.data.validation
    for key, source in named.items():
        problems += _missing_of(key, source, overrides)
    template = config.data.chat_template
    if template is not None and template not in NAMED and not user_path(template).is_file():
        names = ", ".join(NAMED)
        problems.append(f"data.chat_template={cut(template)}: no such file; choose {names}, a jinja file, or null")
    found = [problem for problem in problems if problem]
    if found:
        raise ConfigError(found)


def _missing_of(key: str, source: SourceConfig, overrides: Sequence[str]) -> list[str]:
    problems = []
    if source.path is not None and not is_shipped(source.path) and not user_path(source.path).is_dir():
        try:
            find_files(source.path)
        except DataError as error:
            typed = _typed(f"{key}.path", overrides)
            problems.append(f"{typed}={cut(source.path)}: {str(error).partition(': ')[2]}")
    if source.exclude_ids is not None and not user_path(source.exclude_ids).is_file():
        what = "no such file (one document id per line)"
        problems.append(f"{key}.exclude_ids={cut(source.exclude_ids)}: {what}")
    return problems


def _typed(key: str, overrides: Sequence[str]) -> str:
    """data.path for the path of the source `main`, unless that was written out."""
    is_written = any(text.lstrip("+").startswith(f"{key}=") for text in overrides)
    return "data.path" if key == "data.sources.main.path" and not is_written else key
