"""`regex`: does the response match a pattern, and is what a group of it caught the right answer?"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, model_validator

from rlhf.reward.verifiers.verifier import Payload, Verifier

FLAGS = {"ignorecase": re.IGNORECASE, "multiline": re.MULTILINE, "dotall": re.DOTALL}


class RegexFields(Payload):
    pattern: str = Field(description="Regular expression, in the syntax of Python's `re`.")
    flags: list[Literal["ignorecase", "multiline", "dotall"]] = Field(
        [], description="Flags of `re`: `ignorecase`, `multiline`, `dotall`."
    )
    match: Literal["search", "full"] = Field(
        "search", description="`search`: the pattern matches somewhere in the response; `full`: it matches all of it."
    )
    group: int | str | None = Field(
        None, description="Number or name of the group that must have caught `answer`. Null: a match is enough."
    )
    answer: str | None = Field(
        None,
        description="With `group`: the right answer; blanks around it do not count. Of several matches the last one counts.",
    )

    @model_validator(mode="after")
    def _compiles(self) -> RegexFields:
        try:
            compiled = self.compiled()
        except re.error as error:
            raise ValueError(f"field `pattern`: not a regular expression: {error}") from None
        if (self.group is None) != (self.answer is None):
            raise ValueError("fields `group` and `answer`: give both or neither")
        known = self.group is None or self.group in compiled.groupindex or self.group in range(compiled.groups + 1)
        if not known:
            raise ValueError(f"field `group`: the pattern has no group {self.group!r}")
        return self

    def compiled(self) -> re.Pattern[str]:
        """The pattern, with its flags."""
        flags = re.NOFLAG if hasattr(re, "NOFLAG") else re.RegexFlag(0)
        for name in self.flags:
            flags |= FLAGS[name]
        return re.compile(self.pattern, flags)


class RegexVerifier(Verifier[RegexFields]):
    """1 for a match with the right answer in it, else 0. A pattern that does not come to an end is stopped with its worker."""

    fields = RegexFields
    time_limit_s = 5.0

    def score(self, prompt: str, response: str, fields: RegexFields) -> float:
        pattern = fields.compiled()
        matches = [pattern.fullmatch(response)] if fields.match == "full" else [None, *pattern.finditer(response)]
        found = matches[-1]
        if found is None:
            return 0.0
        if fields.group is None or fields.answer is None:
            return 1.0
        return float((found[fields.group] or "").strip() == fields.answer.strip())
