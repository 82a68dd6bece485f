"""The eval of docs/extending.md, with an argument more, of a few words."""

import re
from dataclasses import replace

from launch_runs import ROOT

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
code = next(block for block in re.findall(r"```python\n(.*?)```", PAGE, re.S) if "EVAL = " in block)
found: dict = {}
exec(compile(code, "docs/extending.md", "exec"), found)
EVAL = replace(
    found["EVAL"],
    keys=found["EVAL"].keys | {"style": "plain or fancy"},
    choices={"style": ("plain", "fancy")},
)
