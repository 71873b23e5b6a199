"""The words of one subject or of several, put into prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dbtrain.config.inputs import OneOfSeveral, Subject


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
