"""What the photos show: the words of one subject or of several, put into prompts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from dbtrain.config.base import Positive, Section, Text

PLACEHOLDER = re.compile(r"\{(|token|class)\}")


class Subject(Section):
    """What the photos show. Prompts can refer to it: see `filled`."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")] | None = Field(
        None,
        description="names the run: `run_dir` defaults to `runs/NAME`, and `data.shards` to `shards/NAME`",
    )
    token: Text | None = Field(
        None, description="rare word that comes to mean the subject, e.g. `sks`; `{token}` in prompts"
    )
    class_word: Text | None = Field(
        None, description="what the subject is, e.g. `dog`; `{class}` in prompts, where `{}` is both words"
    )

    def filled(self, prompt: str) -> str:
        """A prompt with the words in place of `{token}`, `{class}` and `{}`, as far as they are set."""
        known = {"token": self.token, "class": self.class_word}
        if self.token and self.class_word:
            known[""] = f"{self.token} {self.class_word}"
        return PLACEHOLDER.sub(lambda match: known.get(match[1]) or match[0], prompt)


class OneOfSeveral(Section):
    """One of the subjects that an adapter learns together."""

    token: Text = Field(description="rare word that comes to mean this subject, another one for each")
    class_word: Text = Field(description="what it is, e.g. `dog`; subjects of a class share its images")
    photos: Text = Field(description="folder with photos of this subject")
    prompt: Text | None = Field(None, description="its prompt (null: `prepare.instance_prompt`)")
    class_prompt: Text | None = Field(None, description="its class's prompt (null: `prepare.class_prompt`)")
    weight: Positive = Field(1.0, description="how often it is trained on, relative to the others")

    @property
    def words(self) -> Subject:
        return Subject(token=self.token, class_word=self.class_word)


def describe_first(values: dict[str, Any], several: Sequence[OneOfSeveral]) -> None:
    """Give each of several subjects its own prompts; `subject` and `prepare` then describe the first one."""
    prepare = values.get("prepare") if isinstance(values.get("prepare"), dict) else None
    own = [
        one.model_copy(update={
            key: filled(text, [one.words])
            for key, text in (
                ("prompt", one.prompt or (prepare or {}).get("instance_prompt")),
                ("class_prompt", one.class_prompt or (prepare or {}).get("class_prompt")),
            )
        })
        for one in several
    ]  # fmt: skip
    first = own[0]
    words = {"token": first.token, "class_word": first.class_word}
    for section, derived in (("subject", words), ("prepare", {"photos": first.photos})):
        given = values.get(section) or {}
        for key, value in derived.items() if isinstance(given, dict) else ():
            if given.get(key, value) != value:
                raise ValueError(
                    f"{section}.{key} is '{given[key]}', but each of subjects has its own; remove it"
                )
        if section == "subject" or prepare is not None:
            values[section] = given | derived
    if prepare is not None:
        values["prepare"] |= {"instance_prompt": first.prompt, "class_prompt": first.class_prompt}
    values["subjects"] = [one.model_dump(mode="json") for one in own]


def filled(value: Any, subjects: Sequence[Subject]) -> Any:
    """A prompt with the first subject's words, or each prompt of a list with those of each subject.

    Other values stay as they are.
    """
    if isinstance(value, (list, tuple)):
        every = [one.filled(text) if isinstance(text, str) else text for text in value for one in subjects]
        return [text for k, text in enumerate(every) if text not in every[:k]] if len(subjects) > 1 else every
    return subjects[0].filled(value) if isinstance(value, str) else value
