"""The words for a subject: its token, what it is, and prompts that put it somewhere."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dbtrain.config import Evaluation, Prepare
from dbtrain.runtime.errors import ConfigError

# Where subjects of any kind can be, or what they can look like; `{}` is the subject.
CONTEXTS = (
    "a {} in the snow",
    "a {} on a sandy shore",
    "a {} on a kitchen table",
    "a {} between the shelves of a library",
    "a {} in front of a waterfall",
    "a {} on the back seat of a car",
    "a {} at night under street lamps",
    "a {} in a field of lavender",
    "a {} beside a swimming pool",
    "an oil painting of a {}",
)


@dataclass(frozen=True)
class Subject:
    token: str  # "sks"
    kind: str  # "dog"
    class_prompt: str  # "a photo of a dog"

    def put(self, prompt: str) -> tuple[str, str]:
        """(what to draw, the same without the token) of a prompt with `{}`, or with the token, in it.

        Raises ConfigError if it has neither.
        """
        if "{}" in prompt:
            return prompt.replace("{}", f"{self.token} {self.kind}"), prompt.replace("{}", self.kind)
        without = re.sub(rf"(?<!\w){re.escape(self.token)}(?!\w)\s*", "", prompt).strip()
        if without == prompt.strip():
            raise ConfigError(
                f"evaluation.prompts: '{prompt}' is not about the subject; write {{}} where it shall "
                f"stand, or '{self.token} {self.kind}'"
            )
        return prompt, without


def of(prepare: Prepare | None, evaluation: Evaluation) -> Subject:
    """The subject of a config, read from its two prompts where `evaluation` does not say.

    The token is the words of the instance prompt that the class prompt lacks; what the subject is
    follows it. Raises ConfigError that says what to set where that cannot be told.
    """
    if prepare is None:
        raise ConfigError("evaluate needs the photos: the config has no prepare section")
    instance, of_class = prepare.instance_prompt.split(), (prepare.class_prompt or "").split()
    token = (evaluation.token or _token(prepare, instance, of_class)).split()
    spots = [k for k in range(len(instance)) if instance[k : k + len(token)] == token]
    if not spots:
        raise ConfigError(
            f"evaluation.token is '{' '.join(token)}', which prepare.instance_prompt "
            f"('{prepare.instance_prompt}') does not have"
        )
    after = instance[spots[0] + len(token) :]
    kind = evaluation.class_word or " ".join(_shared(after, of_class) if of_class else after)
    if not kind:
        raise ConfigError(
            f"what '{' '.join(token)}' is cannot be told from prepare.instance_prompt "
            f"('{prepare.instance_prompt}'); set evaluation.class_word, e.g. to dog"
        )
    article = "an" if kind[0].lower() in "aeiou" else "a"
    return Subject(" ".join(token), kind, prepare.class_prompt or f"a photo of {article} {kind}")


def _token(prepare: Prepare, instance: Sequence[str], of_class: Sequence[str]) -> str:
    """The words that only the instance prompt has, if they stand together."""
    known = {word.lower() for word in of_class}
    spots = [k for k, word in enumerate(instance) if word.lower() not in known]
    if not of_class or not spots or spots[-1] - spots[0] >= len(spots):
        raise ConfigError(
            f"the word that names the subject cannot be told from prepare.instance_prompt "
            f"('{prepare.instance_prompt}') and prepare.class_prompt ('{prepare.class_prompt or ''}'); "
            "set evaluation.token, e.g. to sks"
        )
    return " ".join(instance[spots[0] : spots[-1] + 1])


def _shared(after: Sequence[str], of_class: Sequence[str]) -> Sequence[str]:
    """The longest start of `after` that stands in the class prompt as well."""
    for length in range(len(after), 0, -1):
        if any(of_class[k : k + length] == after[:length] for k in range(len(of_class))):
            return after[:length]
    return ()


def prompts(subject: Subject, evaluation: Evaluation) -> list[tuple[str, str]]:
    """(what to draw, the same without the token) of every prompt."""
    return [subject.put(prompt) for prompt in evaluation.prompts or CONTEXTS]
